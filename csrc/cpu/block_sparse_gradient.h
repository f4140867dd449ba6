// Gradients of a product with stored blocks. Included by block_sparse_linear_simd.cpp only.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/block_sparse_linear.h"
#include "cpu/epilogue.h"
#include "cpu/lanes.h"
#include "cpu/panel.h"
#include "cpu/tiles.h"

namespace prunelm::PRUNELM_ISA {
namespace {

// Gradient of x, for blocks of whole panels. Rows of grad lie side by side, as do sums of all of K
// for them; a row of blocks adds to the sums of the columns that it has. So the little that is read
// again and again, 16 rows of grad, stays in the first-level cache.

// As many rows as leave grad and the sums in the second-level cache.
int64_t grad_x_rows(const BlockSparseView& w) { return w.N + w.K <= 3072 ? 64 : 32; }

int64_t grad_x_size(const BlockSparseView& w, int64_t rows) {
  return (w.N + w.block_columns() * w.bk) * row_lanes(rows);
}

// sums[i][8 E] += values[i][0:terms] times as many rows of grad [terms][lanes], for R columns.
template <int R, int E, typename C>
void add_to_columns(const C* values, int64_t bn, int64_t terms, const C* grad, int64_t lanes,
                    int64_t lane, C* const* sums) {
  Lanes<C, E> sum[R];
  for (int64_t begin = 0; begin < terms; begin += kRun) {
    const int64_t end = begin + kRun < terms ? begin + kRun : terms;
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) sum[i].clear();
    for (int64_t n = begin; n < end; ++n) {
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) sum[i].add(values[i * bn + n], grad + n * lanes + lane);
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) sum[i].put(sums[i] + lane, false);
  }
}

template <typename C>
void grad_x_of_panels(const BlockSparseView& w, const MatrixView& grad, void* scratch,
                      const LinearResult& out) {
  const int64_t lanes = row_lanes(grad.rows), columns = w.block_columns() * w.bk;
  C* const packed = static_cast<C*>(scratch);
  C* const sums = packed + w.N * lanes;
  pack_lanes(grad, 0, lane_groups(grad.rows), packed);
  std::memset(sums, 0, columns * lanes * sizeof(C));
  for (int64_t r = 0; r < w.block_rows(); ++r) {
    const int64_t count = (w.crow[r + 1] - w.crow[r]) * w.bk, n = r * w.bn;
    const int64_t terms = w.bn < w.N - n ? w.bn : w.N - n;
    const int32_t* col = w.col + w.crow[r];
    const C* values = static_cast<const C*>(w.values) + w.crow[r] * w.bk * w.bn;
    const Tiles tiles(count);
    int64_t k = 0;
    for (int64_t t = 0; t < tiles.count(); ++t) {
      C* own[kTileRows];
      for (int i = 0; i < tiles.rows(t); ++i) {
        own[i] = sums + (*col * w.bk + k) * lanes;
        if (++k == w.bk) k = 0, ++col;
      }
      with_rows(tiles.rows(t), [&](auto size) {
        constexpr int R = decltype(size)::value;
        over_eights<kEights<R>>(lanes / 8, [&](auto e, int64_t first) {
          add_to_columns<R, decltype(e)::value>(values, w.bn, terms, packed + n * lanes, lanes,
                                                first * 8, own);
        });
      });
      values += tiles.rows(t) * w.bn;
    }
  }
  // Eight rows at a time, so that each is written from its beginning to its end.
  auto* const to = static_cast<C*>(out.data);
  for (int64_t m = 0; m < grad.rows; m += kPackRows) {
    const int64_t rows = grad.rows - m < kPackRows ? grad.rows - m : kPackRows;
    int64_t k = 0;
    for (; k + kPackRows <= w.K; k += kPackRows) {
      pack_transposed(sums + k * lanes + m, lanes, kPackRows, rows, to + m * out.columns + k,
                      out.columns);
    }
    for (; k < w.K; ++k) {
      for (int64_t i = m; i < m + rows; ++i) to[i * out.columns + k] = sums[k * lanes + i];
    }
  }
}

// Gradient of the blocks: sums over rows of x and grad, which are both turned over first, so that
// every stored number's two factors are read in order.

PRUNELM_INLINE int64_t in_eights(int64_t rows) { return (rows + kPackRows - 1) / kPackRows * 8; }

// Columns of `from` that are turned over together: what is written stays in the first-level cache.
constexpr int64_t kStrip = 64;

// out[c][in_eights(rows)] = column c of `from` for c in [begin, end), zeros past its rows and
// columns.
template <typename C>
void turn_columns(const MatrixView& from, int64_t begin, int64_t end, C* out) {
  const int64_t lanes = in_eights(from.rows);
  const auto* data = static_cast<const C*>(from.data);
  for (int64_t c = begin; c < end; c += kStrip) {
    const int64_t stop = c + kStrip < end ? c + kStrip : end;
    const int64_t filled = stop < from.columns ? stop : from.columns;
    for (int64_t m = 0; m < from.rows && c < filled; m += kPackRows) {
      const int rows = int(from.rows - m < kPackRows ? from.rows - m : kPackRows);
      fetch_rows(data + (m + 2 * kPackRows) * from.stride + c, from.stride,
                 from.rows - m - 2 * kPackRows, filled - c);
      pack_transposed(data + m * from.stride + c, from.stride, rows, filled - c,
                      out + c * lanes + m, lanes);
    }
    for (int64_t k = c; k < stop; ++k) {
      const int64_t rows = k < filled ? from.rows : 0;
      std::memset(out + k * lanes + rows, 0, (lanes - rows) * sizeof(C));
    }
  }
}

// out[p][rows][16] = columns 16 p to 16 p + 15 of `from` for p in [begin, end), zeros past the
// last.
template <typename C>
void cut_panels(const MatrixView& from, int64_t begin, int64_t end, C* out) {
  constexpr int64_t kTogether = kStrip / kWidth;
  for (int64_t first = begin; first < end; first += kTogether) {
    const int64_t last = first + kTogether < end ? first + kTogether : end;
    for (int64_t m = 0; m < from.rows; ++m) {
      const C* const own = static_cast<const C*>(from.data) + m * from.stride;
      fetch_rows(own + kPackRows * from.stride + first * kWidth, from.stride,
                 m + kPackRows < from.rows, kStrip);
      for (int64_t p = first; p < last; ++p) {
        C* const row = out + (p * from.rows + m) * kWidth;
        const int64_t n = p * kWidth;
        if (n + kWidth <= from.columns) {
          std::memcpy(row, own + n, kWidth * sizeof(C));
        } else {
          for (int i = 0; i < kWidth; ++i) row[i] = n + i < from.columns ? own[n + i] : C(0);
        }
      }
    }
  }
}

// values[i][0:16] = or += sums over `rows` of column i times 16 columns of grad, for R columns.
template <int R, typename C>
void add_columns(const C* const* column, const C* panel, int64_t rows, bool first, C* values,
                 int64_t stride) {
  const C* own[R];
  for (int i = 0; i < R; ++i) own[i] = column[i];
  Sums<R, C> sum;
  for (int64_t begin = 0; begin < rows; begin += kRun) {
    const int64_t end = begin + kRun < rows ? begin + kRun : rows;
    sum.clear();
    for (int64_t m = begin; m < end; ++m) sum.add(own, m, panel + m * kWidth);
    if (begin || !first) sum.add_from(values, stride);
    sum.put(values, stride);
  }
}

// Rows of blocks [begin, end) of whole panels; x [columns][in_eights(rows)], grad
// [panels][rows][16].
template <typename C>
void grad_of_panels(const BlockSparseView& w, int64_t rows, const C* x, const C* grad, bool first,
                    int64_t begin, int64_t end, C* values) {
  const int64_t lanes = in_eights(rows);
  for (int64_t r = begin; r < end; ++r) {
    const int64_t from = w.crow[r], count = (w.crow[r + 1] - from) * w.bk;
    const Tiles tiles(count);
    for (int64_t n = 0; n < w.bn; n += kWidth) {
      const C* const panel = grad + (r * w.bn + n) * rows;
      const int32_t* col = w.col + from;
      int64_t k = 0;
      const C* column[kTileRows];
      for (int64_t t = 0; t < tiles.count(); ++t) {
        for (int i = 0; i < tiles.rows(t); ++i) {
          column[i] = x + (*col * w.bk + k) * lanes;
          if (++k == w.bk) k = 0, ++col;
        }
        with_rows(tiles.rows(t), [&](auto size) {
          add_columns<decltype(size)::value>(
              column, panel, rows, first, values + (from * w.bk + tiles.begin(t)) * w.bn + n, w.bn);
        });
      }
    }
  }
}

// The same for blocks of any width, one number after the other; grad [outputs][in_eights(rows)].
template <typename C>
void grad_of_lines(const BlockSparseView& w, int64_t rows, const C* x, const C* grad, bool first,
                   int64_t begin, int64_t end, C* values) {
  const int64_t lanes = in_eights(rows);
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t i = 0; i < w.bn; ++i) {
      const C* const own = grad + (r * w.bn + i) * lanes;
      over_eights<8>(lanes / 8, [&](auto eights, int64_t at) {
        using L = Lanes<C, decltype(eights)::value>;
        using V = typename L::V;
        V g[L::kCount];
#pragma GCC unroll 16
        for (int v = 0; v < L::kCount; ++v) g[v] = load<V>(own + at * 8 + v * L::kLanes);
        for (int64_t j = w.crow[r]; j < w.crow[r + 1]; ++j) {
          for (int64_t k = 0; k < w.bk; ++k) {
            const C* const column = x + (w.col[j] * w.bk + k) * lanes + at * 8;
            V sum[2] = {};
#pragma GCC unroll 16
            for (int v = 0; v < L::kCount; ++v) {
              sum[v % 2] = fused(load<V>(column + v * L::kLanes), g[v], sum[v % 2]);
            }
            C* const value = values + (j * w.bk + k) * w.bn + i;
            const C total = sum_of(sum[0] + sum[1]);
            *value = first && at == 0 ? total : *value + total;
          }
        }
      });
    }
  }
}

}  // namespace
}  // namespace prunelm::PRUNELM_ISA
