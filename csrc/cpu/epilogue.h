// What the linear kernels do to their sums: bias, activation, the result's dtype. Included by
// *_simd.cpp only, as element.h.
#pragma once

#include <cstdint>

#include "cpu/activation.h"
#include "cpu/panel.h"

namespace prunelm::PRUNELM_ISA {
namespace {

// y[first:first + rows, n:n + most] = activation(sums [rows][16] + bias), as far as y has columns;
// most is at most 16.
template <typename C>
__attribute__((noinline)) void finish_rows(const C* sums, int64_t n, int64_t most, int64_t first,
                                           int64_t rows, const LinearResult& y) {
  constexpr int kLanes = sizeof(Vector<C>) / sizeof(C);
  const int64_t count = y.columns - n < most ? y.columns - n : most;
  alignas(64) C row[kWidth] = {};
  if (y.bias) {
    with_number(y.bias_number, [&](auto zero) {
      const auto* own = static_cast<const decltype(zero)*>(y.bias) + n;
      for (int64_t i = 0; i < count; ++i) row[i] = C(widen(own[i]));
    });
  }
  Vector<C> bias[kWidth / kLanes];
  for (int v = 0; v < kWidth / kLanes; ++v) bias[v] = load<Vector<C>>(row + v * kLanes);
  with_number(y.number, [&](auto zero) {
    using Y = decltype(zero);
    if constexpr (sizeof(Y) <= sizeof(C)) {
      for (int64_t m = 0; m < rows; ++m) {
        for (int v = 0; v < kWidth / kLanes; ++v) {
          const Vector<C> sum = load<Vector<C>>(sums + m * kWidth + v * kLanes) + bias[v];
          const Vector<C> done = activated(sum, y.activation);
          std::memcpy(row + v * kLanes, &done, sizeof(done));
        }
        Y* const out = static_cast<Y*>(y.data) + (first + m) * y.columns + n;
        if (count == kWidth) {
          for (int i = 0; i < kWidth; ++i) narrow(row[i], out + i);
        } else {
          for (int64_t i = 0; i < count; ++i) narrow(row[i], out + i);
        }
      }
    }
  });
}

// y[first:first + R, n:n + 16] = activation(sum + bias), as far as y has columns.
template <int R, typename C>
PRUNELM_INLINE void finish(Sums<R, C>& sum, int64_t n, int64_t first, const LinearResult& y) {
  constexpr auto own = sizeof(C) == 8 ? Number::f64 : Number::f32;
  if (y.number == own && y.activation == Activation::none && n + kWidth <= y.columns &&
      (!y.bias || y.bias_number == own)) {
    if (y.bias) sum.add_from(static_cast<const C*>(y.bias) + n, 0);
    sum.put(static_cast<C*>(y.data) + first * y.columns + n, y.columns);
    return;
  }
  alignas(64) C sums[R * kWidth];
  sum.put(sums, kWidth);
  finish_rows(sums, n, kWidth, first, R, y);
}

}  // namespace
}  // namespace prunelm::PRUNELM_ISA
