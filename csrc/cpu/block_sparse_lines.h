// Products with blocks of any width: rows of x side by side, an output at a time. Included by
// block_sparse_linear_simd.cpp only.
//
// Runs are cut as a panel's: as many whole blocks as have at most kRun terms, or kRun terms of one
// long block.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/block_sparse_linear.h"
#include "cpu/epilogue.h"
#include "cpu/panel.h"
#include "cpu/tiles.h"

namespace prunelm::PRUNELM_ISA {
namespace {

// Blocks along the dimension that is summed over: a row of blocks, or for the gradient a column.
template <typename W>
struct Line {
  const W* values;       // the line's first output in block 0 of values
  const int32_t* other;  // [count] which column (or row) of blocks
  const int32_t* place;  // [count] in values; null: as they stand
  int64_t count;
};

struct LineShape {
  int64_t size, length;                            // of a block along the sum; of the whole sum
  int64_t own_step, sum_step;                      // strides in values
  int64_t block;                                   // numbers of a block
  int64_t in_run = size < kRun ? kRun / size : 1;  // blocks of a run
  int64_t pieces = (size + kRun - 1) / kRun;       // runs of a block
};

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

// out[i] [8 E] = R outputs of a line, for 8 E rows of x [length][lanes].
template <int R, int E, typename W, typename C>
void outputs(const LineShape& s, const Line<W>& own, const C* x, int64_t lanes, C* out,
             int64_t out_row) {
  Lanes<C, E> sum[R];
  for (int64_t first = 0, piece = 0; first == 0 || first < own.count;) {
    const bool begins = first == 0 && piece == 0;
    const int64_t end = first + s.in_run;
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) sum[i].clear();
    for (int64_t j = first; j < std::min(end, own.count); ++j) {
      const int64_t k = own.other[j] * s.size + piece, left = s.length - k;
      const int64_t terms = std::min(std::min(s.size - piece, kRun), left);
      const C* at = x + k * lanes;
      const W* value = own.values + (own.place ? own.place[j] : j) * s.block + piece * s.sum_step;
      for (int64_t t = 0; t < terms; ++t, at += lanes, value += s.sum_step) {
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) sum[i].add(value[i * s.own_step], at);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) sum[i].put(out + i * out_row, begins);
    piece += kRun;
    if (piece >= s.size) first = end, piece = 0;
  }
}

// out[l] [8 E] = the one output of each of L lines of single numbers, shortest line first. Lines
// side by side keep the multipliers busy: a line's terms wait for each other.
template <int L, int E, bool placed, int64_t known_lanes, typename W, typename C>
void single(const Line<W>* const* lines, const C* x, int64_t lanes, C* const* out) {
  if constexpr (known_lanes > 0) lanes = known_lanes;
  const W* values[L];
  const int32_t *other[L], *place[L];
#pragma GCC unroll 4
  for (int l = 0; l < L; ++l) {
    values[l] = lines[l]->values;
    other[l] = lines[l]->other;
    place[l] = lines[l]->place;
  }
  const int64_t least = lines[0]->count, most = lines[L - 1]->count;
  Lanes<C, E> sum[L];
  for (int64_t first = 0; first == 0 || first < most; first += kRun) {
#pragma GCC unroll 4
    for (int l = 0; l < L; ++l) sum[l].clear();
    int64_t j = first;
    const int64_t stop = std::min(first + kRun, least);
#if defined(__AVX2__)
    if constexpr (__is_same(W, float) && !placed) {
      for (; j + 4 <= stop; j += 4) {
#pragma GCC unroll 4
        for (int l = 0; l < L; ++l) sum[l].add_four(values[l] + j, other[l] + j, x, lanes);
      }
    }
#endif
    for (; j < stop; ++j) {
#pragma GCC unroll 4
      for (int l = 0; l < L; ++l) {
        sum[l].add(values[l][placed ? place[l][j] : j], x + other[l][j] * lanes);
      }
    }
#pragma GCC unroll 4
    for (int l = 0; l < L; ++l) {
      const int64_t count = lines[l]->count;
      for (int64_t i = j; i < std::min(first + kRun, count); ++i) {
        sum[l].add(values[l][placed ? place[l][i] : i], x + other[l][i] * lanes);
      }
      if (first == 0 || first < count) sum[l].put(out[l], first == 0);
    }
  }
}

// sums [count][rows] of `count` lines of single numbers.
template <bool placed, int64_t known_lanes, typename W, typename C>
void singles(const Line<W>* lines, int64_t count, int64_t eights, const C* x, int64_t lanes,
             C* sums) {
  constexpr int kTogether = 4;
  const int64_t rows = eights * 8;
  const Line<W>* of[kWidth];
  C* out[kWidth];
  for (int64_t l = 0; l < count; ++l) {  // by length, so that lines side by side end together
    int64_t at = l;
    for (; at > 0 && of[at - 1]->count > lines[l].count; --at) of[at] = of[at - 1];
    of[at] = lines + l;
  }
  for (int64_t l = 0; l < count; ++l) out[l] = sums + (of[l] - lines) * rows;
  over_eights<known_lanes == 8 ? 1 : 8>(eights, [&](auto e, int64_t first) {
    constexpr int E = decltype(e)::value;
    constexpr int kVectors = Lanes<C, E>::kCount;
    constexpr int L = kVectors >= 8 ? 1 : kVectors >= 4 ? 2 : kTogether;
    C* own[kWidth];
    for (int64_t l = 0; l < count; ++l) own[l] = out[l] + first * 8;
    int64_t l = 0;
    for (; l + L <= count; l += L) {
      single<L, E, placed, known_lanes>(of + l, x + first * 8, lanes, own + l);
    }
    for (; l < count; ++l) {
      single<1, E, placed, known_lanes>(of + l, x + first * 8, lanes, own + l);
    }
  });
}

// The outputs of `count` lines, `each` of each -> sums [count * each][rows].
template <typename W, typename C>
void sums_of(const LineShape& s, const Line<W>* of, int64_t count, int64_t each, int64_t eights,
             const C* x, int64_t lanes, C* sums) {
  const int64_t rows = eights * 8;
  if (each == 1 && s.size == 1) {
    if (of->place) return singles<true, 0>(of, count, eights, x, lanes, sums);
    if (lanes == 8) return singles<false, 8>(of, count, eights, x, lanes, sums);
    return singles<false, 0>(of, count, eights, x, lanes, sums);
  }
  const int64_t tiles = (each + kTileRows - 1) / kTileRows;
  for (int64_t l = 0; l < count; ++l) {
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t i = t * each / tiles, size = (t + 1) * each / tiles - i;
      Line<W> part = of[l];
      part.values += i * s.own_step;
      C* const out = sums + (l * each + i) * rows;
      with_rows(int(size), [&](auto r) {
        constexpr int R = decltype(r)::value;
        // Fewer outputs, more rows: the sums fit into the registers.
        over_eights<R == 1   ? 8
                    : R <= 3 ? 4
                             : 2>(eights, [&](auto e, int64_t at) {
          outputs<R, decltype(e)::value>(s, part, x + at * 8, lanes, out + at * 8, rows);
        });
      });
    }
  }
}

// Outputs of the lines [begin, end), `own` each; line_of(c) gives one.
template <typename W, typename LineOf, typename C = Compute<W>>
void lines(const LineShape& s, int64_t own, int64_t begin, int64_t end, LineOf line_of,
           const C* packed, int64_t outputs, const LinearResult& y) {
  const int64_t eights = (y.rows + 7) / 8, lanes = row_lanes(y.rows);
  alignas(64) C sums[kWidth * kPassRows], turned[kPassRows * kWidth];
  const int64_t together = own < kWidth ? kWidth / own : 1;  // lines whose outputs fill a panel
  for (int64_t c = begin; c < end; c += together) {
    const int64_t count = std::min(together, end - c);
    for (int64_t first = 0; first < own; first += kWidth) {
      const int64_t each = std::min<int64_t>(own - first, kWidth);
      const int64_t n = c * own + first, here = std::min(count * each, outputs - n);
      if (here <= 0) break;
      fetch_result(n, 0, y.rows, y);
      Line<W> of[kWidth] = {};
      for (int64_t l = 0; l < count; ++l) {
        of[l] = line_of(c + l);
        of[l].values += first * s.own_step;
      }
      sums_of(s, of, count, each, eights, packed, lanes, sums);
      turn(sums, eights * 8, int(here), y.rows, turned);
      finish_rows(turned, n, here, 0, y.rows, y);
    }
  }
}

template <typename W>
void forward_lines(const BlockSparseView& w, const Compute<W>* packed, int64_t begin, int64_t end,
                   const LinearResult& y) {
  const int64_t block = w.bn * w.bk;
  const auto row = [&](int64_t r) -> Line<W> {
    const int64_t first = w.crow[r];
    return {static_cast<const W*>(w.values) + first * block, w.col + first, nullptr,
            w.crow[r + 1] - first};
  };
  lines<W>({w.bk, w.K, 1, w.bn, block}, w.bn, begin, end, row, packed, w.N, y);
}

}  // namespace
}  // namespace prunelm::PRUNELM_ISA
