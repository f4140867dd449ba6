// Sums of 16 outputs at a time, the linear kernels' unit of work. Included by *_simd.cpp only, as
// element.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/element.h"

namespace prunelm::PRUNELM_ISA {
namespace {

constexpr int kWidth = 16;  // outputs of a panel

// A sum runs over K in ascending order in registers and is added to the total in memory, and starts
// anew, at every multiple of kChunk and after at most kRun terms. The rule knows the pattern of
// stored blocks but not M, so a row's bits do not depend on M. Short runs lose fewer bits; chunks
// keep a panel's weights in the first-level cache while all tiles read them.
constexpr int64_t kRun = 64;
constexpr int64_t kChunk = 512;
constexpr int64_t kChunkRuns = 4;  // 16 KB of a panel's weights, which all tiles read

// R x 16 running sums.
template <int R, typename C, typename V = Wide<C>>
struct Sums {
  static constexpr int kLanes = sizeof(V) / sizeof(C), kParts = kWidth / kLanes;
  V part[R][kParts];

  PRUNELM_INLINE void clear() {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int p = 0; p < kParts; ++p) part[i][p] = V{};
  }

  // sums[i][:] += a[i] * b[:]
  template <typename A, typename B>
  PRUNELM_INLINE void add(const A* a, const B* b) {
#if defined(__AVX2__)
    // Loads are what takes longest: four rows come in one.
    if constexpr (__is_same(A, float) && R >= 4) {
      const V four = load_four<V>(a);
      return add_each(b, [&](auto i) __attribute__((always_inline)) {
        if constexpr (i.value < 4) return splat<i.value>(four);
        if constexpr (i.value >= 4) return broadcast<V>(a[i.value]);
      });
    }
#endif
    add_each(
        b, [&](auto i) __attribute__((always_inline)) { return broadcast<V>(widen(a[i.value])); });
  }

  // sums[i][:] += a[i][at] * b[:]
  PRUNELM_INLINE void add(const C* const* a, int64_t at, const C* b) {
    add_each(b,
             [&](auto i) __attribute__((always_inline)) { return broadcast<V>(a[i.value][at]); });
  }

  // sums[i][:] += value(i) * b[:], a row after the other: there are no registers for all values.
  template <typename B, typename Value>
  PRUNELM_INLINE void add_each(const B* b, Value value) {
    V wide[kParts];
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) wide[p] = load<V>(b + p * kLanes);
    add_rows(wide, value);
  }
  template <int first = 0, typename Value>
  PRUNELM_INLINE void add_rows(const V (&wide)[kParts], Value value) {
    if constexpr (first < R) {
      const V x = value(Constant<first>{});
#pragma GCC unroll 4
      for (int p = 0; p < kParts; ++p) part[first][p] = fused(x, wide[p], part[first][p]);
      add_rows<first + 1>(wide, value);
    }
  }

  // sums[i][:] += from[i * row + 0:16]
  PRUNELM_INLINE void add_from(const C* from, int64_t row) {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
      for (int p = 0; p < kParts; ++p) {
        part[i][p] = load<V>(from + i * row + p * kLanes) + part[i][p];
      }
    }
  }

  // out[i * row + 0:16] = sums[i][:]
  PRUNELM_INLINE void put(C* out, int64_t row) const {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
      for (int p = 0; p < kParts; ++p) {
        std::memcpy(out + i * row + p * kLanes, &part[i][p], sizeof(V));
      }
    }
  }

  // out[i * row + 0:16] += sums[i][:], and from zero again.
  PRUNELM_INLINE void flush(C* out, int64_t row) {
    add_from(out, row);
    put(out, row);
    clear();
  }
};

}  // namespace
}  // namespace prunelm::PRUNELM_ISA
