// Products with blocks of any width: rows of x side by side, an output at a time. Included by
// block_sparse_linear_simd.cpp only.
#pragma once

#include <algorithm>
#include <cstdint>

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
// Runs are cut as a panel's: as many whole blocks as have at most kRun terms, or kRun terms of one
// long block.
struct LineShape {
  int64_t size, length;                            // of a block along the sum; of the whole sum
  int64_t own_step, sum_step;                      // strides in values
  int64_t block;                                   // numbers of a block
  int64_t in_run = size < kRun ? kRun / size : 1;  // blocks of a run
  int64_t pieces = (size + kRun - 1) / kRun;       // runs of a block
};

template <typename C>
constexpr int kLanes = 32 / sizeof(C);

// sums[(l, i)][8 E] = R outputs of each of L lines, for 8 E rows of x, which lie `lanes` (8 or 16)
// side by side at each k, in groups of 16 `group` numbers apart. Runs are cut as for panels. Where
// `unit`, blocks have one term.
template <int R, int L, int E, int lanes, bool unit, typename W, typename C>
void line(const LineShape& s, const Line<W>* lines, const C* x, int64_t group, C* sums,
          int64_t sums_row) {
  constexpr int kVectors = E * 8 / kLanes<C>;
  const int64_t size = unit ? 1 : s.size, in_run = unit ? kRun : s.in_run;
  int64_t count = 0, common = lines[0].count;
#pragma GCC unroll 4
  for (int l = 0; l < L; ++l) {
    count = std::max(count, lines[l].count);
    common = std::min(common, lines[l].count);
  }
  const auto lane = [&](int v) {
    const int64_t row = v * kLanes<C>;
    return row / 16 * group + row % 16;
  };
  Vector<C> sum[L * R][kVectors];
  const auto term = [&](int l, const C* at, const W* value) __attribute__((always_inline)) {
    Vector<C> wide[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) wide[v] = load<Vector<C>>(at + lane(v));
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const Vector<C> w = broadcast<Vector<C>>(widen(value[i * s.own_step]));
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) {
        sum[l * R + i][v] = fused(w, wide[v], sum[l * R + i][v]);
      }
    }
  };
  const auto add = [&](int l, int64_t j, int64_t piece) __attribute__((always_inline)) {
    const Line<W>& own = lines[l];
    const int64_t first = own.other[j] * size + piece;
    const C* at = x + first * lanes;
    const W* value = own.values + (own.place ? own.place[j] : j) * s.block + piece * s.sum_step;
    // No prefetcher foresees which rows of x follow; few blocks ahead fit into the first-level
    // cache.
    constexpr int64_t kAhead = unit ? 4 : 1;
    const C* next = x + (own.other[j + kAhead < own.count ? j + kAhead : j] * size + piece) * lanes;
    const auto fetch = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int v = 0; lanes == 16 && v < kVectors; v += 2) __builtin_prefetch(next + lane(v));
    };
    if constexpr (unit) {
      fetch();
      return term(l, at, value);
    }
    const int64_t left = s.length - first, terms = std::min(size - piece, kRun);
    const int64_t stop = left < terms ? left : terms;
    for (int64_t k = 0; k < stop; ++k, at += lanes, value += s.sum_step, next += lanes) {
      fetch();
      term(l, at, value);
    }
  };
  for (int64_t first = 0, piece = 0; first < count;) {
    const int64_t end = first + in_run;
#pragma GCC unroll 8
    for (int i = 0; i < L * R; ++i)
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) sum[i][v] = Vector<C>{};
    int64_t j = first;
    for (const int64_t stop = std::min(end, common); j < stop; ++j) {
#pragma GCC unroll 4
      for (int l = 0; l < L; ++l) add(l, j, piece);
    }
#pragma GCC unroll 4
    for (int l = 0; l < L; ++l) {
      for (int64_t i = j; i < std::min(end, lines[l].count); ++i) add(l, i, piece);
    }
#pragma GCC unroll 8
    for (int i = 0; i < L * R; ++i) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) {
        C* const out = sums + i * sums_row + v * kLanes<C>;
        const Vector<C> total = load<Vector<C>>(out) + sum[i][v];
        std::memcpy(out, &total, sizeof(total));
      }
    }
    piece += kRun;
    if (piece >= size) first = end, piece = 0;
  }
}

// `count` lines of one output each -> sums[count][rows].
template <int lanes, bool unit, typename W, typename C>
void single_lines(const LineShape& s, const Line<W>* of, int64_t count, int64_t eights, const C* x,
                  int64_t group, C* sums) {
  constexpr int kMost = lanes / 8;
  const int64_t rows = eights * 8;
  const auto at = [&](int64_t e) { return x + e / 2 * group + e % 2 * 8; };
  int64_t l = 0;
  // Few rows: four lines side by side keep the multipliers busy.
  for (; eights <= kMost && l + 4 <= count; l += 4) {
    over_eights<kMost>(eights, [&](auto e, int64_t first) {
      line<1, 4, decltype(e)::value, lanes, unit>(s, of + l, at(first), group,
                                                  sums + l * rows + first * 8, rows);
    });
  }
  for (; l < count; ++l) {
    over_eights<lanes == 8 ? 1 : 8>(eights, [&](auto e, int64_t first) {
      line<1, 1, decltype(e)::value, lanes, unit>(s, of + l, at(first), group,
                                                  sums + l * rows + first * 8, rows);
    });
  }
}

// Outputs of the lines [begin, end), `own` each; line_of(c) gives one.
template <int lanes, typename W, typename LineOf, typename C = Compute<W>>
void lines(const LineShape& s, int64_t own, int64_t begin, int64_t end, LineOf line_of,
           const C* packed, int64_t outputs, const LinearResult& y) {
  const int64_t eights = (y.rows + 7) / 8, rows = eights * 8, group = kWidth * s.length;
  alignas(64) C sums[kWidth * kPassRows], turned[kPassRows * kWidth];
  const int64_t together = own < kWidth ? kWidth / own : 1;  // lines whose outputs fill a panel
  for (int64_t c = begin; c < end; c += together) {
    const int64_t count = std::min(together, end - c);
    for (int64_t first = 0; first < own; first += kWidth) {
      const int64_t each = std::min<int64_t>(own - first, kWidth);
      const int64_t n = c * own + first, here = std::min(count * each, outputs - n);
      if (here <= 0) break;
      fetch_result(n, 0, y.rows, y);
      std::fill_n(sums, count * each * rows, C(0));
      Line<W> of[kWidth];
      for (int64_t l = 0; l < count; ++l) {
        of[l] = line_of(c + l);
        of[l].values += first * s.own_step;
      }
      if (each == 1 && s.size == 1) {
        single_lines<lanes, true>(s, of, count, eights, packed, group, sums);
      } else if (each == 1) {
        single_lines<lanes, false>(s, of, count, eights, packed, group, sums);
      } else {
        for (int64_t l = 0; l < count; ++l) {
          const int64_t tiles = (each + kTileRows - 1) / kTileRows;
          for (int64_t t = 0; t < tiles; ++t) {
            const int64_t i = t * each / tiles, size = (t + 1) * each / tiles - i;
            Line<W> part = of[l];
            part.values += i * s.own_step;
            C* const out = sums + (l * each + i) * rows;
            with_rows(int(size), [&](auto r) {
              constexpr int R = decltype(r)::value;
              constexpr int kMost = lanes == 8 ? 1 : R <= 3 ? 4 : 2;
              over_eights<kMost>(eights, [&](auto e, int64_t at) {
                line<R, 1, decltype(e)::value, lanes, false>(
                    s, &part, packed + at / 2 * group + at % 2 * 8, group, out + at * 8, rows);
              });
            });
          }
        }
      }
      turn(sums, rows, int(here), y.rows, turned);
      finish_rows(turned, n, here, 0, y.rows, y);
    }
  }
}

template <typename W, typename LineOf>
void lines(const LineShape& s, int64_t own, int64_t begin, int64_t end, LineOf line_of,
           const Compute<W>* packed, int64_t outputs, const LinearResult& y) {
  if (y.rows <= kPackRows) return lines<8, W>(s, own, begin, end, line_of, packed, outputs, y);
  lines<16, W>(s, own, begin, end, line_of, packed, outputs, y);
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
