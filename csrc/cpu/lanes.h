// Sums for rows of x that lie side by side. Included by *_simd.cpp only, as element.h.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/element.h"

namespace prunelm::PRUNELM_ISA {
namespace {

// 8 E rows of x at one k, as vectors.
template <typename C, int E>
struct Lanes {
  using V = std::conditional_t<E % 2 == 0, Wide<C>, Vector<C>>;
  static constexpr int kLanes = sizeof(V) / sizeof(C), kCount = E * 8 / kLanes;
  V part[kCount];

  PRUNELM_INLINE void clear() {
#pragma GCC unroll 16
    for (int v = 0; v < kCount; ++v) part[v] = V{};
  }
  // += w * x[:]
  template <typename W>
  PRUNELM_INLINE void add(W w, const C* x) {
    add(broadcast<V>(widen(w)), x);
  }
  PRUNELM_INLINE void add(V w, const C* x) {
#pragma GCC unroll 16
    for (int v = 0; v < kCount; ++v) part[v] = fused(w, load<V>(x + v * kLanes), part[v]);
  }
  // += w[i] * x[at[i]][:] for i = 0 to 3, in this order, in few loads: they are what takes longest.
  PRUNELM_INLINE void add_four(const float* w, const int32_t* at, const float* x, int64_t lanes) {
    const V four = load_four<V>(w);
    uint64_t first, second;
    std::memcpy(&first, at, 8);
    std::memcpy(&second, at + 2, 8);
    add(splat<0>(four), x + (first & 0xffffffffu) * lanes);
    add(splat<1>(four), x + (first >> 32) * lanes);
    add(splat<2>(four), x + (second & 0xffffffffu) * lanes);
    add(splat<3>(four), x + (second >> 32) * lanes);
  }
  // out = or += these
  PRUNELM_INLINE void put(C* out, bool first) const {
#pragma GCC unroll 16
    for (int v = 0; v < kCount; ++v) {
      const V total = first ? part[v] : load<V>(out + v * kLanes) + part[v];
      std::memcpy(out + v * kLanes, &total, sizeof(total));
    }
  }
};

// How many eights of rows fit into the registers beside R outputs for each.
template <int R>
constexpr int kEights = (R == 1   ? 8
                         : R <= 3 ? 4
                                  : 2) *
                        (kWideBytes == 64 && R > 1 ? 2 : 1);

}  // namespace
}  // namespace prunelm::PRUNELM_ISA
