// Products with blocks of whole panels (bn divisible by 16): 16 outputs at a time. Included by
// block_sparse_linear_simd.cpp only.
//
// A panel's sum runs over its stored blocks in ascending order and is cut into runs: as many whole
// blocks as have at most kRun terms, or kRun terms of one long block. Each run is summed in
// registers and added to the total in memory. The rule knows the pattern of stored blocks but not
// M, so a row's bits do not depend on M.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/block_sparse_linear.h"
#include "cpu/epilogue.h"
#include "cpu/panel.h"
#include "cpu/tiles.h"

namespace prunelm::PRUNELM_ISA {
namespace {

// The stored blocks of one panel.
template <typename W>
struct Panel {
  const W* values;     // the panel's first output in its first block
  const int32_t* col;  // [count]
  int64_t count;
  int64_t whole;  // blocks that end within K: all, or all but the last
  int64_t n;      // its first output in the result
};

// Where a panel's run begins.
struct Position {
  int64_t block = 0, piece = 0;
};

// How many terms of a block stand in the code after each other.
template <int BK>
constexpr int kUnrolled = BK == 0    ? 1
                          : BK == 16 ? 4
                                     : BK;

// How blocks are cut into runs. BK is bk, 16 for multiples of 16, or 0 where the compiler does not
// know it; BN is bn or 0.
template <int BK, int BN>
struct Blocks {
  int64_t K, bk, bn;
  int64_t in_run;  // whole blocks of a run
  int64_t pieces;  // runs of a block

  explicit Blocks(const BlockSparseView& w)
      : K(w.K),
        bk(w.bk),
        bn(w.bn),
        in_run(w.bk < kRun ? kRun / w.bk : 1),
        pieces(w.bk > kRun ? (w.bk + kRun - 1) / kRun : 1) {}
  PRUNELM_INLINE int64_t width() const { return BN ? BN : bn; }
  PRUNELM_INLINE int64_t length() const { return BK && BK < 16 ? BK : bk; }
  PRUNELM_INLINE int64_t size() const { return length() * width(); }

  // The position so many runs on.
  Position after(Position at, int64_t runs) const {
    if (pieces == 1) return {at.block + runs * in_run, 0};
    for (; runs > 0; --runs) {
      at.piece += kRun;
      if (at.piece >= bk) at = {at.block + 1, 0};
    }
    return at;
  }
  // Runs of a panel with so many blocks.
  int64_t runs(int64_t stored) const {
    return pieces > 1 ? stored * pieces : (stored + in_run - 1) / in_run;
  }
};

// sum += `terms` rows of x times as many rows of a block, which are `width` apart. Meanwhile
// `ahead` numbers past these rows of x more are fetched: no prefetcher foresees where the next
// blocks are.
template <int R, int BK, typename W, typename C>
PRUNELM_INLINE void add_terms(Sums<R, C>& sum, const C* x, int64_t ahead, const W* values,
                              int64_t width, int64_t terms) {
  constexpr int64_t kLine = 64 / sizeof(C);
  for (int64_t k = 0; k < terms; k += kUnrolled<BK>) {
    if constexpr (BK > 0 && R > 3) {
#pragma GCC unroll 8
      for (int64_t i = 0; i < kUnrolled<BK> * R; i += kLine) __builtin_prefetch(x + ahead + i);
    }
#pragma GCC unroll 16
    for (int u = 0; u < kUnrolled<BK>; ++u) sum.add(x + u * R, values + u * width);
    x += kUnrolled<BK> * R;
    values += kUnrolled<BK> * width;
  }
}

// Which runs of one panel are added, and where in the panel they begin.
struct Chunk {
  int64_t begin, end, count;  // runs [begin, end) of `count`
  Position at;
};

// These runs for `tiles` tiles of R rows, the first of which are x [K][R] and begin at `row` of y.
template <int R, bool kLong, int BK, int BN, typename W, typename C>
__attribute__((noinline)) void add_chunk(const Blocks<BK, BN>& blocks, const Panel<W>& panel,
                                         const Chunk& chunk, int64_t tiles, const C* x, int64_t row,
                                         C* total, const LinearResult& y) {
  const int64_t length = blocks.length(), scale = length * R, size = blocks.size();
  const int64_t width = blocks.width(), whole = panel.whole, count = panel.count, K = blocks.K;
  const int64_t ahead = R * K, in_run = blocks.in_run;
  for (; tiles > 0; --tiles, x += ahead, row += R, total += R * kWidth) {
    Position at = chunk.at;
    Sums<R, C> sum;
    sum.clear();
    for (int64_t r = chunk.begin; r < chunk.end; ++r) {
      if (r > chunk.begin) sum.clear();
      if constexpr (kLong) {
        const C* const own = x + panel.col[at.block] * scale + at.piece * R;
        const W* const values = panel.values + at.block * size + at.piece * width;
        if (at.block < whole) {
          const int64_t left = length - at.piece;
          add_terms<R, BK>(sum, own, ahead, values, width, left < kRun ? left : kRun);
        } else {
          const int64_t left = K - panel.col[at.block] * length - at.piece;
          add_terms<R, 0>(sum, own, 0, values, width, left < kRun ? left : kRun);
        }
        at.piece += kRun;
        if (at.piece >= length) at = {at.block + 1, 0};
      } else {
        const int64_t stop = at.block + in_run;
        const W* values = panel.values + at.block * size;
        int64_t j = at.block;
        for (const int64_t end = stop < whole ? stop : whole; j < end; ++j, values += size) {
          add_terms<R, BK>(sum, x + panel.col[j] * scale, ahead, values, width, length);
        }
        if (j < count && j < stop) {
          add_terms<R, 0>(sum, x + panel.col[j] * scale, 0, values, width,
                          K - panel.col[j] * length);
        }
        at.block = stop;
      }
      if (r > 0) sum.add_from(total, kWidth);
      if (r + 1 < chunk.count) sum.put(total, kWidth);
    }
    if (chunk.end == chunk.count) finish(sum, panel.n, row, y);
  }
}

// One panel for all tiles, a chunk of runs after the other.
template <bool kLong, int BK, int BN, typename W, typename C = Compute<W>>
void panel_of_tiles(const Blocks<BK, BN>& blocks, const Panel<W>& panel, const Tiles& tiles,
                    const C* packed, const LinearResult& y) {
  alignas(64) C sums[kPassRows * kWidth];
  Chunk chunk{0, 0, blocks.runs(panel.count), {}};
  do {
    chunk.end = chunk.begin + kChunkRuns < chunk.count ? chunk.begin + kChunkRuns : chunk.count;
    tiles.by_rows([&](auto rows, int64_t first, int64_t count) {
      constexpr int R = decltype(rows)::value;
      add_chunk<R, kLong>(blocks, panel, chunk, count, tiles.x(packed, first, blocks.K),
                          tiles.begin(first), sums + tiles.begin(first) * kWidth, y);
    });
    chunk.at = blocks.after(chunk.at, chunk.end - chunk.begin);
    chunk.begin = chunk.end;
  } while (chunk.begin < chunk.count);
}

// sum[g] = the run at `at` of each of G panels, for R rows of x, packed [K][R].
template <int R, int G, int BK, int BN, typename W, typename C>
PRUNELM_INLINE void add_runs(const Blocks<BK, BN>& blocks, const Panel<W>* panel, Position at,
                             const C* x, Sums<R, C>* sum) {
  const int64_t scale = blocks.length() * R, size = blocks.size(), width = blocks.width();
  const int64_t left = blocks.length() - at.piece, terms = left < kRun ? left : kRun;
  const int64_t stop = at.block + blocks.in_run;
  x += at.piece * R;
  const auto value = [&](int g, int64_t j) __attribute__((always_inline)) {
    return panel[g].values + j * size + at.piece * width;
  };
  int64_t common = panel[0].whole;
#pragma GCC unroll 8
  for (int g = 0; g < G; ++g) {
    sum[g].clear();
    common = panel[g].whole < common ? panel[g].whole : common;
  }
  int64_t j = at.block;
  for (; j < (stop < common ? stop : common); ++j) {
    const C* row[G];
    const W* values[G];
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) {
      row[g] = x + panel[g].col[j] * scale;
      values[g] = value(g, j);
    }
    for (int64_t k = 0; k < terms; k += kUnrolled<BK>) {
#pragma GCC unroll 16
      for (int u = 0; u < kUnrolled<BK>; ++u) {
#pragma GCC unroll 8
        for (int g = 0; g < G; ++g) {
          sum[g].add(row[g] + (k + u) * R, values[g] + (k + u) * width);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int g = 0; g < G; ++g) {
    int64_t i = j;
    for (; i < (stop < panel[g].whole ? stop : panel[g].whole); ++i) {
      add_terms<R, BK>(sum[g], x + panel[g].col[i] * scale, 0, value(g, i), width, terms);
    }
    if (i < stop && i < panel[g].count) {  // reaches past K
      const int64_t rest = blocks.K - panel[g].col[i] * blocks.length() - at.piece;
      add_terms<R, 0>(sum[g], x + panel[g].col[i] * scale, 0, value(g, i), width,
                      rest < kRun ? rest : kRun);
    }
  }
}

// Few rows: G panels side by side, since one alone has too few sums to keep the multipliers busy.
template <int R, int G, int BK, int BN, typename W, typename C = Compute<W>>
void panels_of_tile(const Blocks<BK, BN>& blocks, const Panel<W>* panel, const C* x,
                    const LinearResult& y) {
  alignas(64) C total[G][R * kWidth] = {};
  Sums<R, C> sum[G];
#pragma GCC unroll 8
  for (int g = 0; g < G; ++g) sum[g].clear();
  int64_t most = 0;
  for (int g = 0; g < G; ++g) most = std::max(most, panel[g].count);
  const int64_t count = blocks.runs(most);
  Position at;
  for (int64_t r = 0; r < count; ++r) {
    add_runs<R, G>(blocks, panel, at, x, sum);
    at = blocks.after(at, 1);
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) {
      if (r > 0) sum[g].add_from(total[g], kWidth);
      if (r + 1 < count) sum[g].put(total[g], kWidth);
    }
  }
#pragma GCC unroll 8
  for (int g = 0; g < G; ++g) finish(sum[g], panel[g].n, 0, y);
}

// visit(r) for the rows of blocks [begin, end), those of about equal size after each other, so that
// panels side by side end together.
template <typename Visit>
void by_size(const BlockSparseView& w, int64_t begin, int64_t end, Visit visit) {
  constexpr int64_t kSizes = 64, kMost = 1024;
  int16_t order[kMost];
  for (int64_t from = begin; from < end; from += kMost) {
    const int64_t to = from + kMost < end ? from + kMost : end;
    int32_t most = 0;
    for (int64_t r = from; r < to; ++r) most = std::max(most, w.crow[r + 1] - w.crow[r]);
    int shift = 0;
    while (most >> shift >= kSizes) ++shift;
    int16_t place[kSizes + 1] = {};
    for (int64_t r = from; r < to; ++r) ++place[((w.crow[r + 1] - w.crow[r]) >> shift) + 1];
    for (int64_t s = 1; s < kSizes; ++s) place[s] += place[s - 1];
    for (int64_t r = from; r < to; ++r) {
      order[place[(w.crow[r + 1] - w.crow[r]) >> shift]++] = int16_t(r - from);
    }
    for (int64_t i = 0; i < to - from; ++i) visit(from + order[i]);
  }
}

template <int BK, int BN, typename W>
void forward_panels(const BlockSparseView& w, const Compute<W>* packed, int64_t begin, int64_t end,
                    const LinearResult& y) {
  const Blocks<BK, BN> blocks(w);
  const Tiles tiles(y.rows);
  const int64_t partial = w.K % w.bk ? w.K / w.bk : -1;  // the column of blocks that K cuts
  const auto panel_of = [&](int64_t r, int64_t n) -> Panel<W> {
    const int64_t first = w.crow[r], count = w.crow[r + 1] - first;
    const bool cut = count && w.col[first + count - 1] == partial;
    return {static_cast<const W*>(w.values) + first * blocks.size() + n, w.col + first, count,
            count - cut, r * blocks.width() + n};
  };
  if (y.rows <= 3) {
    const auto grouped = [&](auto rows, auto together) {
      constexpr int R = decltype(rows)::value, G = decltype(together)::value;
      Panel<W> panel[G];
      int waiting = 0;
      by_size(w, begin, end, [&](int64_t r) {
        for (int64_t n = 0; n < blocks.width() && r * blocks.width() + n < w.N; n += kWidth) {
          panel[waiting++] = panel_of(r, n);
          if (waiting == G) {
            panels_of_tile<R, G>(blocks, panel, packed, y);
            waiting = 0;
          }
        }
      });
      if (waiting == 0) return;
      // Fewer panels take as long: the last stands in for those that are missing.
      std::fill(panel + waiting, panel + G, panel[waiting - 1]);
      panels_of_tile<R, G>(blocks, panel, packed, y);
    };
    // Enough sums to keep the multipliers busy, and few streams of weights.
    constexpr int kPanels = sizeof(Compute<W>) == 4 ? 4 : 2;
    if (y.rows == 1) return grouped(Constant<1>{}, Constant<kPanels>{});
    if (y.rows == 2) return grouped(Constant<2>{}, Constant<kPanels / 2>{});
    return grouped(Constant<3>{}, Constant<kPanels / 2>{});
  }
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t n = 0; n < blocks.width() && r * blocks.width() + n < w.N; n += kWidth) {
      if (blocks.pieces == 1) {
        panel_of_tiles<false>(blocks, panel_of(r, n), tiles, packed, y);
      } else if constexpr (BK == 0 || BK == 16) {
        panel_of_tiles<true>(blocks, panel_of(r, n), tiles, packed, y);
      }
    }
  }
}

}  // namespace
}  // namespace prunelm::PRUNELM_ISA
