// Products with blocks of any width: rows of x side by side, an output at a time. Included by
// block_sparse_linear_simd.cpp only.
//
// Runs are cut as a panel's: as many whole blocks as have at most kRun terms, or kRun terms of one
// long block.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/block_sparse_linear.h"
#include "cpu/epilogue.h"
#include "cpu/lanes.h"
#include "cpu/panel.h"
#include "cpu/tiles.h"

namespace prunelm::PRUNELM_ISA {
namespace {

// The stored blocks of one row of blocks.
template <typename W>
struct Line {
  const W* values;     // the line's first output in its first block
  const int32_t* col;  // [count]
  int64_t count;
};

// out[i] [8 E] = R of a line's outputs, for 8 E rows of x [K][lanes].
template <int R, int E, typename W, typename C>
void outputs(const BlockSparseView& w, const Line<W>& own, const C* x, int64_t lanes, C* out,
             int64_t out_row) {
  const int64_t in_run = w.bk < kRun ? kRun / w.bk : 1;
  Lanes<C, E> sum[R];
  for (int64_t first = 0, piece = 0; first == 0 || first < own.count;) {
    const bool begins = first == 0 && piece == 0;
    const int64_t end = first + in_run;
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) sum[i].clear();
    for (int64_t j = first; j < std::min(end, own.count); ++j) {
      const int64_t k = own.col[j] * w.bk + piece;
      const int64_t terms = std::min(std::min(w.bk - piece, kRun), w.K - k);
      const C* at = x + k * lanes;
      const W* value = own.values + (j * w.bk + piece) * w.bn;
      for (int64_t t = 0; t < terms; ++t, at += lanes, value += w.bn) {
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) sum[i].add(value[i], at);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) sum[i].put(out + i * out_row, begins);
    piece += kRun;
    if (piece >= w.bk) first = end, piece = 0;
  }
}

// out[l] [8 E] = the one output of each of L lines of single numbers, shortest line first. Lines
// side by side keep the multipliers busy: a line's terms wait for each other.
template <int L, int E, int64_t known_lanes, typename W, typename C>
void single(const Line<W>* const* lines, const C* x, int64_t lanes, C* const* out) {
  if constexpr (known_lanes > 0) lanes = known_lanes;
  const W* values[L];
  const int32_t* col[L];
#pragma GCC unroll 4
  for (int l = 0; l < L; ++l) {
    values[l] = lines[l]->values;
    col[l] = lines[l]->col;
  }
  const int64_t least = lines[0]->count, most = lines[L - 1]->count;
  Lanes<C, E> sum[L];
  for (int64_t first = 0; first == 0 || first < most; first += kRun) {
#pragma GCC unroll 4
    for (int l = 0; l < L; ++l) sum[l].clear();
    int64_t j = first;
    const int64_t stop = std::min(first + kRun, least);
#if defined(__AVX2__)
    if constexpr (__is_same(W, float)) {
      for (; j + 4 <= stop; j += 4) {
#pragma GCC unroll 4
        for (int l = 0; l < L; ++l) sum[l].add_four(values[l] + j, col[l] + j, x, lanes);
      }
    }
#endif
    for (; j < stop; ++j) {
#pragma GCC unroll 4
      for (int l = 0; l < L; ++l) {
        sum[l].add(values[l][j], x + col[l][j] * lanes);
      }
    }
#pragma GCC unroll 4
    for (int l = 0; l < L; ++l) {
      const int64_t count = lines[l]->count;
      for (int64_t i = j; i < std::min(first + kRun, count); ++i) {
        sum[l].add(values[l][i], x + col[l][i] * lanes);
      }
      if (first == 0 || first < count) sum[l].put(out[l], first == 0);
    }
  }
}

// sums [count][rows] of `count` lines of single numbers.
template <int64_t known_lanes, typename W, typename C>
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
      single<L, E, known_lanes>(of + l, x + first * 8, lanes, own + l);
    }
    for (; l < count; ++l) {
      single<1, E, known_lanes>(of + l, x + first * 8, lanes, own + l);
    }
  });
}

// `each` outputs of each of `count` lines -> sums [count * each][rows].
template <typename W, typename C>
void sums_of(const BlockSparseView& w, const Line<W>* of, int64_t count, int64_t each,
             int64_t eights, const C* x, int64_t lanes, C* sums) {
  const int64_t rows = eights * 8;
  if (w.bn == 1 && w.bk == 1) {
    if (lanes == 8) return singles<8>(of, count, eights, x, lanes, sums);
    return singles<0>(of, count, eights, x, lanes, sums);
  }
  const Tiles tiles(each);
  for (int64_t l = 0; l < count; ++l) {
    for (int64_t t = 0; t < tiles.count(); ++t) {
      Line<W> part = of[l];
      part.values += tiles.begin(t);
      C* const out = sums + (l * each + tiles.begin(t)) * rows;
      with_rows(tiles.rows(t), [&](auto size) {
        constexpr int R = decltype(size)::value;
        over_eights<kEights<R>>(eights, [&](auto e, int64_t at) {
          outputs<R, decltype(e)::value>(w, part, x + at * 8, lanes, out + at * 8, rows);
        });
      });
    }
  }
}

// Rows of blocks [begin, end) of the result.
template <typename W, typename C = Compute<W>>
void forward_lines(const BlockSparseView& w, const C* packed, int64_t begin, int64_t end,
                   const LinearResult& y) {
  const int64_t eights = (y.rows + 7) / 8, lanes = row_lanes(y.rows);
  alignas(64) C sums[kWidth * kPassRows], turned[kPassRows * kWidth];
  const int64_t together = w.bn < kWidth ? kWidth / w.bn : 1;  // lines whose outputs fill a panel
  for (int64_t r = begin; r < end; r += together) {
    const int64_t count = std::min(together, end - r);
    for (int64_t first = 0; first < w.bn; first += kWidth) {
      const int64_t each = std::min<int64_t>(w.bn - first, kWidth);
      const int64_t n = r * w.bn + first, here = std::min(count * each, w.N - n);
      if (here <= 0) break;
      Line<W> of[kWidth] = {};
      for (int64_t l = 0; l < count; ++l) {
        const int64_t at = w.crow[r + l];
        of[l] = {static_cast<const W*>(w.values) + at * w.bn * w.bk + first, w.col + at,
                 w.crow[r + l + 1] - at};
      }
      sums_of(w, of, count, each, eights, packed, lanes, sums);
      turn(sums, eights * 8, int(here), y.rows, turned);
      finish_rows(turned, n, here, 0, y.rows, y);
    }
  }
}

}  // namespace
}  // namespace prunelm::PRUNELM_ISA
