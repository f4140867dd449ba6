#include <algorithm>

#include "cpu/block_sparse_linear.h"
#include "cpu/panel.h"

namespace prunelm::PRUNELM_ISA {
namespace {

// Blocks of whole panels are read 16 outputs at a time; others have their outputs broadcast to 16
// rows of x.
bool has_panels(const BlockSparseView& w) { return w.bn % kWidth == 0; }

// --- whole panels ---
//
// A panel's sum runs over its stored blocks in ascending order and is cut into runs: as many whole
// blocks as have at most kRun terms, or kRun terms of one long block. Each run is summed in
// registers and added to the total in memory. The rule knows the pattern of stored blocks but not
// M, so a row's bits do not depend on M.

// The stored blocks of one panel.
template <typename W>
struct Panel {
  const W* values;     // the panel's first output in its first block
  const int32_t* col;  // [count]
  int64_t count;
  int64_t whole;  // blocks that end within K: all, or all but the last
  int64_t n;      // its first output in the result
};

struct Runs {
  int64_t blocks, pieces;  // blocks of a run; runs of a block

  explicit Runs(int64_t bk)
      : blocks(bk < kRun ? kRun / bk : 1), pieces(bk > kRun ? (bk + kRun - 1) / kRun : 1) {}
  int64_t count(int64_t stored) const { return (stored + blocks - 1) / blocks * pieces; }
};

// BK is 0 where the compiler does not know bk, else bk or a divisor of it; BN likewise.
template <int BK, int BN>
struct Block {
  static constexpr int kUnrolled = BK ? BK : 1;
  int64_t bk, bn;

  explicit Block(const BlockSparseView& w) : bk(w.bk), bn(w.bn) {}
  PRUNELM_INLINE int64_t width() const { return BN ? BN : bn; }
  PRUNELM_INLINE int64_t length() const { return BK && BK < 16 ? BK : bk; }
  PRUNELM_INLINE int64_t size() const { return length() * width(); }

  // sum += `terms` rows of x times as many rows of a block, while the rows at `next` are fetched.
  template <int64_t step, int R, typename W, typename C>
  PRUNELM_INLINE void add(Sums<R, C>& sum, const C* x, const W* values, int64_t terms,
                          const C* next) const {
    constexpr int64_t kLine = 64 / sizeof(C);
    for (int64_t k = 0; k < terms; k += kUnrolled) {
      if constexpr (BK > 0 && step > 1) {
#pragma GCC unroll 8
        for (int64_t i = 0; i < kUnrolled * step; i += kLine) {
          __builtin_prefetch(next + k * step + i);
        }
      }
#pragma GCC unroll 16
      for (int u = 0; u < kUnrolled; ++u)
        sum.add(x + (k + u) * step, 1, values + (k + u) * width());
    }
  }
};

// sums[g][i][:] += runs [r0, r1) of R rows times G panels; x [K][step]. `anew`: = instead of +=.
template <int R, int G, int BK, int BN, typename W, typename C>
void tile(const BlockSparseView& w, const Panel<W>* panel, const C* x, int64_t r0, int64_t r1,
          bool anew, C* sums, int64_t panel_stride) {
  constexpr int64_t step = R == 1 ? 1 : kPackRows;
  const Block<BK, BN> block(w);
  const Block<0, BN> partial(w);
  const Runs runs(block.length());
  const auto row = [&](int g, int64_t j) { return x + panel[g].col[j] * block.length() * step; };
  const auto values = [&](int g, int64_t j) { return panel[g].values + j * block.size(); };
  // No prefetcher foresees where the next blocks are.
  constexpr int64_t kAhead = BK == 1 ? 4 : 2;
  const auto next = [&](int g, int64_t j) {
    return row(g, j + kAhead < panel[g].count ? j + kAhead : j);
  };
  int64_t common = panel[0].whole;
#pragma GCC unroll 4
  for (int g = 1; g < G; ++g) common = panel[g].whole < common ? panel[g].whole : common;

  for (int64_t r = r0; r < r1; ++r) {
    const int64_t first = r / runs.pieces * runs.blocks, piece = r % runs.pieces * kRun;
    const int64_t end = first + runs.blocks;
    const int64_t rest = block.length() - piece < kRun ? block.length() - piece : kRun;
    Sums<R, C> sum[G];
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) sum[g].clear();
    // G panels side by side: one alone has too few sums to keep the multipliers busy.
    int64_t j = first;
    for (const int64_t stop = end < common ? end : common; j < stop; ++j) {
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        block.template add<step>(sum[g], row(g, j) + piece * step,
                                 values(g, j) + piece * block.width(), rest, next(g, j));
      }
    }
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      int64_t i = j;
      if constexpr (G > 1) {
        for (const int64_t stop = end < panel[g].whole ? end : panel[g].whole; i < stop; ++i) {
          block.template add<step>(sum[g], row(g, i) + piece * step,
                                   values(g, i) + piece * block.width(), rest, next(g, i));
        }
      }
      if (i < end && i < panel[g].count) {  // reaches past K
        const int64_t left = w.K - panel[g].col[i] * block.length() - piece;
        partial.template add<step>(sum[g], row(g, i) + piece * step,
                                   values(g, i) + piece * block.width(), left < rest ? left : rest,
                                   x);
      }
      if (anew && r == r0) {
        sum[g].put(sums + g * panel_stride, kWidth);
      } else {
        sum[g].add_to(sums + g * panel_stride, kWidth);
      }
    }
  }
}

template <int G, int BK, int BN, typename W, typename C>
void tile_of(int rows, const BlockSparseView& w, const Panel<W>* panel, const C* x, int64_t r0,
             int64_t r1, bool anew, C* sums, int64_t panel_stride) {
  const auto run = [&](auto r) {
    tile<decltype(r)::value, G, BK, BN>(w, panel, x, r0, r1, anew, sums, panel_stride);
  };
  if constexpr (G == 4) return run(Constant<1>{});
  if constexpr (G == 2) return rows == 2 ? run(Constant<2>{}) : run(Constant<3>{});
  if constexpr (G == 1) return with_rows(rows, run);
}

template <int G, int BK, int BN, typename W, typename C = Compute<W>>
void panels(const BlockSparseView& w, const Panel<W>* panel, const C* packed,
            const LinearResult& y) {
  const Tiles tiles(y.rows);
  const Runs runs(w.bk);
  int64_t count = 0;
  for (int g = 0; g < G; ++g) count = std::max(count, runs.count(panel[g].count));
  if (count && count <= kChunkRuns) {  // a tile's sums are finished while they are at hand
    alignas(64) C sums[G * kTileRows * kWidth];
    alignas(64) C bias[G][kWidth] = {};
    for (int g = 0; g < G; ++g) {
      add_bias(bias[g], panel[g].n, outputs_from(panel[g].n, kWidth, y), y);
    }
    for (int64_t t = 0; t < tiles.count; ++t) {
      const int rows = tiles.rows(t);
      tile_of<G, BK, BN>(rows, w, panel, tiles.x(packed, t, w.K), 0, count, true, sums,
                         rows * kWidth);
      for (int g = 0; g < G; ++g) {
        finish_rows(sums + g * rows * kWidth, bias[g], panel[g].n,
                    outputs_from(panel[g].n, kWidth, y), tiles.begin(t), rows, y);
      }
    }
    return;
  }
  alignas(64) C sums[kPassRows * kWidth];
  const int64_t panel_stride = y.rows * kWidth;
  if (count == 0) std::fill_n(sums, G * panel_stride, C(0));
  for (int64_t r0 = 0; r0 < count; r0 += kChunkRuns) {
    const int64_t r1 = std::min(r0 + kChunkRuns, count);
    for (int64_t t = 0; t < tiles.count; ++t) {
      tile_of<G, BK, BN>(tiles.rows(t), w, panel, tiles.x(packed, t, w.K), r0, r1, r0 == 0,
                         sums + tiles.begin(t) * kWidth, panel_stride);
    }
  }
  for (int g = 0; g < G; ++g) finish_panel(sums + g * panel_stride, panel[g].n, kWidth, y);
}

template <int G, int BK, int BN, typename W>
void panel_groups(const BlockSparseView& w, const Compute<W>* packed, int64_t begin, int64_t end,
                  const LinearResult& y) {
  Panel<W> panel[G];
  int waiting = 0;
  const int64_t partial = w.K % w.bk ? w.K / w.bk : -1;  // the column of blocks that K cuts
  for (int64_t r = begin; r < end; ++r) {
    const int64_t first = w.crow[r], count = w.crow[r + 1] - first;
    const bool cut = count && w.col[first + count - 1] == partial;
    for (int64_t n = 0; n < w.bn && r * w.bn + n < w.N; n += kWidth) {
      panel[waiting++] = {static_cast<const W*>(w.values) + first * w.bk * w.bn + n, w.col + first,
                          count, count - cut, r * w.bn + n};
      if (waiting == G) {
        panels<G, BK, BN>(w, panel, packed, y);
        waiting = 0;
      }
    }
  }
  for (int g = 0; g < waiting; ++g) panels<1, BK, BN>(w, panel + g, packed, y);
}

template <int BK, int BN, typename W>
void forward_panels(const BlockSparseView& w, const Compute<W>* packed, int64_t begin, int64_t end,
                    const LinearResult& y) {
  if (y.rows == 1) return panel_groups<4, BK, BN, W>(w, packed, begin, end, y);
  if (y.rows <= 3) return panel_groups<2, BK, BN, W>(w, packed, begin, end, y);
  panel_groups<1, BK, BN, W>(w, packed, begin, end, y);
}

// --- any block: rows of x side by side, an output at a time ---

// Blocks along the dimension that is summed over: a row of blocks, or for the gradient a column.
template <typename W>
struct Line {
  const W* values;       // the line's first output in block 0 of values
  const int32_t* other;  // [count] which column (or row) of blocks
  const int32_t* place;  // [count] in values; null: as they stand
  int64_t count;
};
struct LineShape {
  int64_t size, length;        // of a block along the sum; of the whole sum
  int64_t own_step, sum_step;  // strides in values
  int64_t block;               // numbers of a block
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
  const int64_t size = unit ? 1 : s.size;
  const Runs runs(size);
  int64_t count = 0, common = lines[0].count;
#pragma GCC unroll 4
  for (int l = 0; l < L; ++l) {
    count = std::max(count, runs.count(lines[l].count));
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
    for (int v = 0; v < kVectors; ++v) wide[v] = load(at + lane(v));
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const Vector<C> w = broadcast<C>(widen(value[i * s.own_step]));
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) {
        sum[l * R + i][v] = fused<C>(w, wide[v], sum[l * R + i][v]);
      }
    }
  };
  const auto add = [&](int l, int64_t j, int64_t piece) __attribute__((always_inline)) {
    const Line<W>& own = lines[l];
    const int64_t first = own.other[j] * size + piece;
    const C* at = x + first * lanes;
    const W* value = own.values + (own.place ? own.place[j] : j) * s.block + piece * s.sum_step;
    if (lanes == 16 && j + 4 < own.count) {  // eight rows of x fit into the first-level cache
      const C* const next = x + (own.other[j + 4] * size + piece) * lanes;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v += 2) __builtin_prefetch(next + lane(v));
    }
    if constexpr (unit) return term(l, at, value);
    const int64_t left = s.length - first, terms = std::min(size - piece, kRun);
    const int64_t stop = left < terms ? left : terms;
    for (int64_t k = 0; k < stop; ++k, at += lanes, value += s.sum_step) term(l, at, value);
  };
  for (int64_t r = 0; r < count; ++r) {
    const int64_t first = r / runs.pieces * runs.blocks, piece = r % runs.pieces * kRun;
    const int64_t end = first + runs.blocks;
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
        const Vector<C> total = load(out) + sum[i][v];
        std::memcpy(out, &total, sizeof(total));
      }
    }
  }
}

// run(Constant<e>{}, first) over `eights` groups of 8 rows, at most `most` (4, 2 or 1) at a time.
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
      finish_panel(turned, n, here, y);
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

// --- entry points ---

int64_t pack_groups(const BlockSparseView& w, int64_t M) {
  return has_panels(w) ? Tiles(M).groups() : lane_groups(M);
}

int64_t pack_size(const BlockSparseView& w, int64_t M) {
  return pack_groups(w, M) * w.K * (has_panels(w) ? Tiles(M).step : kWidth);
}

void pack(const BlockSparseView& w, const MatrixView& x, int64_t begin, int64_t end, void* packed) {
  if (has_panels(w)) return pack_tiles(x, begin, end, packed);
  pack_lanes(x, begin, end, packed);
}

void forward(const BlockSparseView& w, const void* packed, int64_t begin, int64_t end,
             const LinearResult& y) {
  with_number(w.number, [&](auto zero) {
    using W = decltype(zero);
    const auto* x = static_cast<const Compute<W>*>(packed);
    if (!has_panels(w)) return forward_lines<W>(w, x, begin, end, y);
    if constexpr (__is_same(W, float) || __is_same(W, Bf16)) {
      if (w.bn == kWidth && w.bk == 1) return forward_panels<1, kWidth, W>(w, x, begin, end, y);
      if (w.bn == kWidth && w.bk == 4) return forward_panels<4, kWidth, W>(w, x, begin, end, y);
      if (w.bk % 16 == 0) return forward_panels<16, 0, W>(w, x, begin, end, y);
    }
    forward_panels<0, 0, W>(w, x, begin, end, y);
  });
}

void pack_grad(const MatrixView& grad, int64_t begin, int64_t end, void* packed) {
  pack_lanes(grad, begin, end, packed);
}

template <typename C>
void grad_x_of(const BlockSparseView& w, const ColumnsView& columns, const C* packed, int64_t begin,
               int64_t end, const LinearResult& grad) {
  const auto column = [&](int64_t c) -> Line<C> {
    const int64_t first = columns.start[c];
    return {static_cast<const C*>(w.values), columns.row + first, columns.place + first,
            columns.start[c + 1] - first};
  };
  lines<C>({w.bn, w.N, w.bn, 1, w.bn * w.bk}, w.bk, begin, end, column, packed, w.K, grad);
}

void grad_x(const BlockSparseView& w, const ColumnsView& columns, const void* packed, int64_t begin,
            int64_t end, const LinearResult& grad) {
  if (w.number == Number::f64) {
    return grad_x_of(w, columns, static_cast<const double*>(packed), begin, end, grad);
  }
  grad_x_of(w, columns, static_cast<const float*>(packed), begin, end, grad);
}

template <typename C>
void grad_values_of(const BlockSparseView& w, const int32_t* row, const MatrixView& grad,
                    const MatrixView& x, int64_t begin, int64_t end, C* out) {
  for (int64_t j = begin; j < end; ++j) {
    const C* own_x = static_cast<const C*>(x.data) + w.col[j] * w.bk;
    const C* own_grad = static_cast<const C*>(grad.data) + row[j] * w.bn;
    for (int64_t n = 0; n < w.bn; n += kWidth) {
      for (int64_t k = 0; k < w.bk; k += kTileRows) {
        const int rows = int(w.bk - k < kTileRows ? w.bk - k : kTileRows);
        const int64_t width = w.bn - n < kWidth ? w.bn - n : kWidth;
        alignas(64) C sums[kTileRows * kWidth] = {};
        with_rows(rows, [&](auto r) {
          Sums<decltype(r)::value, C> sum;
          sum.clear();
          for (int64_t m = 0; m < x.rows; ++m) {
            if (m % kRun == 0) sum.flush(sums, kWidth);
            sum.add(own_x + m * x.stride + k, 1, own_grad + m * grad.stride + n);
          }
          sum.add_to(sums, kWidth);
        });
        for (int i = 0; i < rows; ++i) {
          std::memcpy(out + (j * w.bk + k + i) * w.bn + n, sums + i * kWidth, width * sizeof(C));
        }
      }
    }
  }
}

void grad_values(const BlockSparseView& w, const int32_t* row, const MatrixView& grad,
                 const MatrixView& x, int64_t begin, int64_t end, void* out) {
  if (w.number == Number::f64) {
    return grad_values_of(w, row, grad, x, begin, end, static_cast<double*>(out));
  }
  grad_values_of(w, row, grad, x, begin, end, static_cast<float*>(out));
}

}  // namespace

const BlockSparseLoops block_sparse_loops{pack_groups, pack_size, pack,       forward,
                                          pack_grad,   grad_x,    grad_values};

}  // namespace prunelm::PRUNELM_ISA
