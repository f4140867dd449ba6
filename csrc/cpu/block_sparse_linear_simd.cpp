#include "cpu/block_sparse_linear.h"
#include "cpu/panel.h"

namespace prunelm::PRUNELM_ISA {
namespace {

// Blocks of whole panels are read 16 outputs at a time; others have their outputs broadcast to 16
// rows of x.
bool has_panels(const BlockSparseView& w) { return w.bn % kWidth == 0; }

// --- whole panels ---

// The stored blocks of one panel that touch the chunk at hand.
template <typename W>
struct Cursor {
  const W* panel;       // the panel's first output in block 0 of values
  int64_t n;            // its first output in the result
  int64_t begin, stop;  // blocks that touch the chunk
  int64_t end;          // of its row of blocks

  // Moves on to the chunk that ends before k1.
  void find(const BlockSparseView& w, int64_t k1) {
    int64_t low = begin, high = end;
    if (k1 >= w.K) low = high;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (int64_t{w.col[middle]} * w.bk < k1) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    stop = low;
  }
  void leave(const BlockSparseView& w, int64_t k1) {
    const bool straddles = stop > begin && (int64_t{w.col[stop - 1]} + 1) * w.bk > k1;
    begin = straddles ? stop - 1 : stop;
  }
};

// What a block has in the chunk [k0, k1): `length` values of k from `first` on.
struct Span {
  int64_t first, length;
};
PRUNELM_INLINE Span span(int64_t block_k, int64_t bk, int64_t k0, int64_t k1) {
  const int64_t low = block_k > k0 ? block_k : k0;
  const int64_t high = block_k + bk < k1 ? block_k + bk : k1;
  return {low, high - low};
}

// sums[g][i][:] += the chunk's part of R rows times G panels; x [K][step].
template <int R, int G, typename W, typename C>
void tile(const BlockSparseView& w, const Cursor<W>* cursor, const C* x, int64_t step, int64_t k0,
          int64_t k1, C* sums, int64_t panel_stride) {
  Sums<R, C> sum[G];
  int64_t steps = cursor[0].stop - cursor[0].begin;
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g) {
    sum[g].clear();
    const int64_t count = cursor[g].stop - cursor[g].begin;
    steps = count < steps ? count : steps;
  }
  const auto locate = [&](int g, int64_t j, const W*& values, const C*& row) {
    const int64_t block_k = int64_t{w.col[j]} * w.bk;
    const Span in = span(block_k, w.bk, k0, k1);
    values = cursor[g].panel + (j * w.bk + in.first - block_k) * w.bn;
    row = x + in.first * step;
    return in.length;
  };
  // A block either fits into the running sums or starts new ones, in runs of its own.
  int64_t summed[G] = {};
  const auto one = [&](int g, int64_t j) __attribute__((always_inline)) {
    const W* values;
    const C* row;
    const int64_t length = locate(g, j, values, row);
    if (summed[g] + length > kRun && summed[g]) {
      sum[g].flush(sums + g * panel_stride, kWidth);
      summed[g] = 0;
    }
    for (int64_t k = 0; k < length;) {
      if (summed[g] == kRun) {
        sum[g].flush(sums + g * panel_stride, kWidth);
        summed[g] = 0;
      }
      const int64_t stop = length - k < kRun ? length : k + kRun;
      summed[g] += stop - k;
      for (; k < stop; ++k) sum[g].add(row + k * step, 1, values + k * w.bn);
    }
  };
  // G panels side by side, as long as their blocks are equally long: one alone has too few sums to
  // keep the multipliers busy.
  int64_t done = 0;
  for (; G > 1 && done < steps; ++done) {
    const W* values[G];
    const C* row[G];
    int64_t length[G];
    bool same = true;
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      length[g] = locate(g, cursor[g].begin + done, values[g], row[g]);
      same &= length[g] == length[0];
    }
    if (!same) break;
    const bool full = summed[0] && summed[0] + length[0] > kRun;
    int64_t total = full ? 0 : summed[0];
    if (full) {
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) sum[g].flush(sums + g * panel_stride, kWidth);
    }
    for (int64_t k = 0; k < length[0];) {
      if (total == kRun) {
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) sum[g].flush(sums + g * panel_stride, kWidth);
        total = 0;
      }
      const int64_t stop = length[0] - k < kRun ? length[0] : k + kRun;
      total += stop - k;
      for (; k < stop; ++k) {
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) sum[g].add(row[g] + k * step, 1, values[g] + k * w.bn);
      }
    }
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) summed[g] = total;
  }
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g) {
    for (int64_t j = cursor[g].begin + done; j < cursor[g].stop; ++j) one(g, j);
    sum[g].add_to(sums + g * panel_stride, kWidth);
  }
}

template <int G, typename W, typename C>
void tile_of(int rows, const BlockSparseView& w, const Cursor<W>* cursor, const C* x, int64_t step,
             int64_t k0, int64_t k1, C* sums, int64_t panel_stride) {
  const auto run = [&](auto r) {
    tile<decltype(r)::value, G>(w, cursor, x, step, k0, k1, sums, panel_stride);
  };
  if constexpr (G == 4) return run(Constant<1>{});
  if constexpr (G == 2) return rows == 2 ? run(Constant<2>{}) : run(Constant<3>{});
  if constexpr (G == 1) return with_rows(rows, run);
}

template <int G, typename W, typename C = Compute<W>>
void panels(const BlockSparseView& w, Cursor<W>* cursor, const C* packed, const LinearResult& y) {
  alignas(64) C sums[kPassRows * kWidth];
  const Tiles tiles(y.rows);
  const int64_t panel_stride = y.rows * kWidth;
  for (int64_t i = 0; i < G * panel_stride; ++i) sums[i] = 0;
  for (int64_t k0 = 0; k0 < w.K; k0 += kChunk) {
    const int64_t k1 = k0 + kChunk < w.K ? k0 + kChunk : w.K;
    for (int g = 0; g < G; ++g) cursor[g].find(w, k1);
    for (int64_t t = 0; t < tiles.count; ++t) {
      tile_of<G>(tiles.rows(t), w, cursor, packed + t * w.K * tiles.step, tiles.step, k0, k1,
                 sums + tiles.begin(t) * kWidth, panel_stride);
    }
    for (int g = 0; g < G; ++g) cursor[g].leave(w, k1);
  }
  for (int g = 0; g < G; ++g) finish_panel(sums + g * panel_stride, cursor[g].n, y);
}

template <int G, typename W>
void panel_groups(const BlockSparseView& w, const Compute<W>* packed, int64_t begin, int64_t end,
                  const LinearResult& y) {
  Cursor<W> cursor[G];
  int waiting = 0;
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t n = 0; n < w.bn && r * w.bn + n < w.N; n += kWidth) {
      cursor[waiting++] = {static_cast<const W*>(w.values) + n, r * w.bn + n, w.crow[r], w.crow[r],
                           w.crow[r + 1]};
      if (waiting == G) {
        panels<G>(w, cursor, packed, y);
        waiting = 0;
      }
    }
  }
  for (int g = 0; g < waiting; ++g) panels<1>(w, cursor + g, packed, y);
}

// --- any block: 16 rows of x side by side ---

// The blocks of a row (or column) of blocks, along the dimension that is summed over.
struct Line {
  const int32_t* other;  // which column (or row) of blocks
  const int32_t* place;  // in values; null: as they stand
  int64_t begin, end;
  int64_t size, length;        // of a block along the sum; of the whole sum
  int64_t own_step, sum_step;  // strides in values
};

template <int R, typename W, typename C = Compute<W>>
void line(const Line& l, const W* values, int64_t block_size, const C* packed, C* sums) {
  int64_t j = l.begin;
  for (int64_t k0 = 0; k0 < l.length; k0 += kChunk) {
    const int64_t k1 = k0 + kChunk < l.length ? k0 + kChunk : l.length;
    Sums<R, C> sum;
    sum.clear();
    int64_t summed = 0;
    for (; j < l.end && l.other[j] * l.size < k1; ++j) {
      const int64_t block_k = l.other[j] * l.size;
      const Span in = span(block_k, l.size, k0, k1);
      const W* block = values + (l.place ? l.place[j] : j) * block_size;
      for (int64_t k = in.first; k < in.first + in.length; ++k, ++summed) {
        if (summed == kRun) {
          sum.flush(sums, kWidth);
          summed = 0;
        }
        sum.add(block + (k - block_k) * l.sum_step, l.own_step, packed + k * kWidth);
      }
      if (block_k + l.size > k1) break;  // the next chunk has the rest
    }
    sum.add_to(sums, kWidth);
  }
}

// Outputs [own, own + count) of the result from one line of blocks.
template <typename W, typename C = Compute<W>>
void lines(const Line& l, const W* values, int64_t block_size, const C* packed, int64_t own,
           int64_t count, const LinearResult& y) {
  for (int64_t m = 0; m < y.rows; m += kWidth) {
    for (int64_t i = 0; i < count; i += kTileRows) {
      const int rows = int(count - i < kTileRows ? count - i : kTileRows);
      alignas(64) C sums[kTileRows * kWidth] = {};
      with_rows(rows, [&](auto r) {
        line<decltype(r)::value>(l, values + i * l.own_step, block_size, packed + m * l.length,
                                 sums);
      });
      finish_line(sums, rows, m, own + i, y);
    }
  }
}

template <typename W>
void forward_lines(const BlockSparseView& w, const Compute<W>* packed, int64_t begin, int64_t end,
                   const LinearResult& y) {
  for (int64_t r = begin; r < end; ++r) {
    const Line l{w.col, nullptr, w.crow[r], w.crow[r + 1], w.bk, w.K, 1, w.bn};
    const int64_t count = w.N - r * w.bn < w.bn ? w.N - r * w.bn : w.bn;
    lines(l, static_cast<const W*>(w.values), w.bn * w.bk, packed, r * w.bn, count, y);
  }
}

// --- entry points ---

int64_t pack_groups(const BlockSparseView& w, int64_t M) {
  return has_panels(w) ? Tiles(M).count : (M + kWidth - 1) / kWidth;
}

int64_t pack_size(const BlockSparseView& w, int64_t M) {
  return pack_groups(w, M) * w.K * (has_panels(w) ? Tiles(M).step : kWidth);
}

void pack(const BlockSparseView& w, const MatrixView& x, int64_t begin, int64_t end, void* packed) {
  if (has_panels(w)) return pack_tiles(x, begin, end, packed);
  pack_sixteens(x, begin, end, packed);
}

void forward(const BlockSparseView& w, const void* packed, int64_t begin, int64_t end,
             const LinearResult& y) {
  with_number(w.number, [&](auto zero) {
    using W = decltype(zero);
    const auto* x = static_cast<const Compute<W>*>(packed);
    if (!has_panels(w)) return forward_lines<W>(w, x, begin, end, y);
    if (y.rows == 1) return panel_groups<4, W>(w, x, begin, end, y);
    if (y.rows <= 3) return panel_groups<2, W>(w, x, begin, end, y);
    panel_groups<1, W>(w, x, begin, end, y);
  });
}

void pack_grad(const MatrixView& grad, int64_t begin, int64_t end, void* packed) {
  pack_sixteens(grad, begin, end, packed);
}

template <typename C>
void grad_x_of(const BlockSparseView& w, const ColumnsView& columns, const C* packed, int64_t begin,
               int64_t end, const LinearResult& grad) {
  for (int64_t c = begin; c < end; ++c) {
    const Line l{
        columns.row, columns.place, columns.start[c], columns.start[c + 1], w.bn, w.N, w.bn, 1};
    const int64_t count = w.K - c * w.bk < w.bk ? w.K - c * w.bk : w.bk;
    lines(l, static_cast<const C*>(w.values), w.bn * w.bk, packed, c * w.bk, count, grad);
  }
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
