// Rows of x as the linear kernels' loops read them: turned over, so that a column's numbers for
// several rows lie side by side. Included by *_simd.cpp only, as element.h.
#pragma once

#include <cstdint>

#include "cpu/element.h"

namespace prunelm::PRUNELM_ISA {
namespace {

constexpr int kPackRows = 8;  // rows that are turned over at once
// Rows of a tile, so that 16 float32 sums of each fill the registers: 3 for SSE's, 6 for AVX2's.
// With AVX-512's 8 are enough to wait for each other.
#if defined(__AVX512F__)
constexpr int kTileRows = 8;
#elif defined(__AVX2__)
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 3;
#endif

// run(Constant<rows>{}) for 1 to kTileRows rows.
template <int least = 1, typename Run>
PRUNELM_INLINE void with_rows(int rows, Run run) {
  if constexpr (least < kTileRows) {
    if (rows != least) return with_rows<least + 1>(rows, run);
  }
  run(Constant<least>{});
}

// M rows as tiles of nearly equal size, since a small tile is as slow as a large one; each is
// packed [K][its rows].
class Tiles {
 public:
  explicit Tiles(int64_t M)
      : count_((M + kTileRows - 1) / kTileRows),
        rows_(count_ ? int(M / count_) : 0),
        larger_(count_ ? M % count_ : 0) {}
  int64_t count() const { return count_; }
  int64_t begin(int64_t t) const { return t * rows_ + (t < larger_ ? t : larger_); }
  int rows(int64_t t) const { return rows_ + (t < larger_); }
  template <typename C>
  C* x(C* packed, int64_t t, int64_t K) const {
    return packed + begin(t) * K;
  }

  // run(Constant<rows>{}, first, count) for the tiles that have one row more, then for the others.
  template <typename Run>
  PRUNELM_INLINE void by_rows(Run run) const {
    if (larger_) with_rows(rows_ + 1, [&](auto rows) { run(rows, int64_t{0}, larger_); });
    if (rows_) with_rows(rows_, [&](auto rows) { run(rows, larger_, count_ - larger_); });
  }

 private:
  int64_t count_;
  int rows_;
  int64_t larger_;  // how many tiles have one row more; they come first
};

#if defined(__AVX2__)
PRUNELM_INLINE void transpose(__m256 (&r)[8]) {
  __m256 t[8], u[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    u[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    u[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    u[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    u[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    r[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
}
#endif

// out[k * out_row + i] = in[i * in_row + k] for i < rows <= 8 and k < count. Where fewer than 8
// rows are given, the lanes up to 8 hold copies of the last.
template <typename X>
void pack_transposed(const X* in, int64_t in_row, int rows, int64_t count, Compute<X>* out,
                     int64_t out_row) {
  const X* row[kPackRows];
  for (int i = 0; i < kPackRows; ++i) row[i] = in + (i < rows ? i : rows - 1) * in_row;
  int64_t k = 0;
#if defined(__AVX2__)
  if constexpr (sizeof(Compute<X>) == 4) {
    for (; k + 8 <= count; k += 8) {
      __m256 r[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) r[i] = load<Vector<float>>(row[i] + k);
      transpose(r);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) _mm256_storeu_ps(out + (k + i) * out_row, r[i]);
    }
  }
#endif
  for (; k < count; ++k) {
    for (int i = 0; i < kPackRows; ++i) out[k * out_row + i] = widen(row[i][k]);
  }
}

// Fetches at most 8 rows of `count` numbers: prefetchers begin anew at every row.
template <typename X>
PRUNELM_INLINE void fetch_rows(const X* from, int64_t stride, int64_t rows, int64_t count) {
  for (int64_t i = 0; i < (rows < kPackRows ? rows : kPackRows); ++i) {
    for (int64_t k = 0; k < count; k += 64 / sizeof(X)) __builtin_prefetch(from + i * stride + k);
  }
}

// out[k * rows + i] = in[i * in_row + k] for i < rows <= 8 and k < count.
template <typename X>
void pack_tile(const X* in, int64_t in_row, int rows, int64_t count, Compute<X>* out) {
  int64_t k = 0;
#if defined(__AVX2__)
  if constexpr (sizeof(Compute<X>) == 4) {
    const X* row[kPackRows];
    for (int i = 0; i < kPackRows; ++i) row[i] = in + (i < rows ? i : rows - 1) * in_row;
    // A store writes 8 lanes; later ones overwrite those past `rows`, the last by the loop below.
    for (; rows > 1 && k + 2 * kPackRows <= count; k += kPackRows) {
      __m256 r[kPackRows];
#pragma GCC unroll 8
      for (int i = 0; i < kPackRows; ++i) r[i] = load<Vector<float>>(row[i] + k);
      transpose(r);
#pragma GCC unroll 8
      for (int i = 0; i < kPackRows; ++i) _mm256_storeu_ps(out + (k + i) * rows, r[i]);
    }
  }
#endif
  for (; k < count; ++k) {
    for (int i = 0; i < rows; ++i) out[k * rows + i] = widen(in[i * in_row + k]);
  }
}

// Tiles [begin, end) of x's rows.
[[maybe_unused]] void pack_tiles(const MatrixView& x, int64_t begin, int64_t end, void* packed) {
  with_number(x.number, [&](auto zero) {
    using X = decltype(zero);
    const Tiles tiles(x.rows);
    for (int64_t t = begin; t < end; ++t) {
      pack_tile(static_cast<const X*>(x.data) + tiles.begin(t) * x.stride, x.stride, tiles.rows(t),
                x.columns, tiles.x(static_cast<Compute<X>*>(packed), t, x.columns));
    }
  });
}

constexpr int kGroup = 16;

// Rows side by side, [K][row_lanes(M)]: 8, or a multiple of 16, so that 16 begin a line of cache.
PRUNELM_INLINE int64_t row_lanes(int64_t M) {
  return M <= kPackRows ? kPackRows : (M + kGroup - 1) / kGroup * kGroup;
}
PRUNELM_INLINE int64_t lane_groups(int64_t M) { return (M + kGroup - 1) / kGroup; }

// Groups [begin, end) of 16 of them.
[[maybe_unused]] void pack_lanes(const MatrixView& x, int64_t begin, int64_t end, void* packed) {
  const int64_t lanes = row_lanes(x.rows), last = end * kGroup < lanes ? end * kGroup : lanes;
  with_number(x.number, [&](auto zero) {
    using X = decltype(zero);
    for (int64_t lane = begin * kGroup; lane < last; lane += kPackRows) {
      const int64_t row = lane < x.rows ? lane : x.rows - 1;
      const int rows = int(x.rows - row < kPackRows ? x.rows - row : kPackRows);
      pack_transposed(static_cast<const X*>(x.data) + row * x.stride, x.stride, rows, x.columns,
                      static_cast<Compute<X>*>(packed) + lane, lanes);
    }
  });
}

// run(Constant<e>{}, first) over `eights` groups of 8 rows, at most `most` (8, 4, 2 or 1) at a
// time.
template <int most, typename Run>
PRUNELM_INLINE void over_eights(int64_t eights, Run run) {
  int64_t e = 0;
  if constexpr (most >= 8) {
    for (; e + 8 <= eights; e += 8) run(Constant<8>{}, e);
  }
  if constexpr (most >= 4) {
    for (; e + 4 <= eights; e += 4) run(Constant<4>{}, e);
  }
  if constexpr (most >= 2) {
    for (; e + 2 <= eights; e += 2) run(Constant<2>{}, e);
  }
  for (; e < eights; ++e) run(Constant<1>{}, e);
}

// to [rows][16] = from [count][stride] turned over; the lanes past count hold anything.
template <typename C>
[[maybe_unused]] void turn(const C* from, int64_t stride, int count, int64_t rows, C* to) {
  for (int half = 0; half < count; half += kPackRows) {
    const int here = count - half < kPackRows ? count - half : kPackRows;
    pack_transposed(from + half * stride, stride, here, rows, to + half, kGroup);
  }
}

}  // namespace
}  // namespace prunelm::PRUNELM_ISA
