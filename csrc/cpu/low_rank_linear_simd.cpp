#include "cpu/epilogue.h"
#include "cpu/low_rank_linear.h"
#include "cpu/panel.h"
#include "cpu/tiles.h"

namespace prunelm::PRUNELM_ISA {
namespace {

// Up to this many rows of x, weights are transposed in registers and used at once; above, a panel's
// chunk is transposed into the first-level cache, which all tiles then read.
constexpr int64_t kDirectRows = 3;

template <typename W>
const W* row_of(const MatrixView& w, int64_t n) {
  return static_cast<const W*>(w.data) + (n < w.rows ? n : w.rows - 1) * w.stride;
}

#if defined(__AVX2__)
// sums[g][i][:] += R rows of x times 16 G rows of w from `n` on, over the chunk [k0, k1); x
// [K][R].
template <int R, int G, typename W>
void direct(const MatrixView& w, int64_t n, const float* x, int64_t k0, int64_t k1, float* sums,
            int64_t panel_stride) {
  const W* row[G * kWidth];
  for (int i = 0; i < G * kWidth; ++i) row[i] = row_of<W>(w, n + i);
  // 32 bytes at a time, as many rows of w as are turned over at once.
  Sums<R, float, Vector<float>> sum[G];
#pragma GCC unroll 2
  for (int g = 0; g < G; ++g) sum[g].clear();
  int64_t k = k0;
  for (; k + 8 <= k1; k += 8) {
    if ((k - k0) % kRun == 0) {
#pragma GCC unroll 2
      for (int g = 0; g < G; ++g) sum[g].flush(sums + g * panel_stride, kWidth);
    }
#pragma GCC unroll 2
    for (int g = 0; g < G; ++g) {
#pragma GCC unroll 2
      for (int p = 0; p < 2; ++p) {
        __m256 r[8];
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) r[i] = load<Vector<float>>(row[g * kWidth + p * 8 + i] + k);
        transpose(r);
#pragma GCC unroll 8
        for (int kk = 0; kk < 8; ++kk) {
#pragma GCC unroll 3
          for (int i = 0; i < R; ++i) {
            sum[g].part[i][p] =
                fused(broadcast<Vector<float>>(x[(k + kk) * R + i]), r[kk], sum[g].part[i][p]);
          }
        }
      }
    }
  }
  for (; k < k1; ++k) {
    for (int g = 0; g < G; ++g) {
      if ((k - k0) % kRun == 0) sum[g].flush(sums + g * panel_stride, kWidth);
      float column[kWidth];
      for (int i = 0; i < kWidth; ++i) column[i] = widen(row[g * kWidth + i][k]);
      sum[g].add(x + k * R, column);
    }
  }
#pragma GCC unroll 2
  for (int g = 0; g < G; ++g) sum[g].flush(sums + g * panel_stride, kWidth);
}
#endif

// sums[0:M][:] += x times 16 rows of w from `n` on, over the chunk [k0, k1), for all tiles of x.
template <typename W, typename C = Compute<W>>
void through_cache(const MatrixView& w, int64_t n, const Tiles& tiles, const C* x, int64_t k0,
                   int64_t k1, C* sums) {
  alignas(64) C panel[kChunk * kWidth];
  for (int half = 0; half < kWidth; half += kPackRows) {
    const int64_t left = w.rows - n - half;
    const int rows = int(left < 1 ? 1 : left < kPackRows ? left : kPackRows);
    pack_transposed(row_of<W>(w, n + half) + k0, w.stride, rows, k1 - k0, panel + half, kWidth);
  }
  for (int64_t t = 0; t < tiles.count(); ++t) {
    with_rows(tiles.rows(t), [&](auto r) {
      constexpr int R = decltype(r)::value;
      Sums<R, C> sum;
      sum.clear();
      const C* at = tiles.x(x, t, w.columns) + k0 * R;
      for (int64_t k = 0; k < k1 - k0;) {
        const int64_t stop = k1 - k0 - k < kRun ? k1 - k0 : k + kRun;
        for (; k < stop; ++k) sum.add(at + k * R, panel + k * kWidth);
        sum.flush(sums + tiles.begin(t) * kWidth, kWidth);
      }
    });
  }
}

// finish(sums [M][16], n) for each of the panels [begin, end) of w's rows.
template <typename W, typename Finish, typename C = Compute<W>>
void products(const MatrixView& w, const C* x, int64_t M, int64_t begin, int64_t end,
              Finish finish) {
  const Tiles tiles(M);
  alignas(64) C sums[kLowRankRows * kWidth];
  const int64_t size = M * kWidth;
  for (int64_t panel = begin; panel < end;) {
    const int64_t n = panel * kWidth;
    const int together = M == 1 && panel + 1 < end ? 2 : 1;
    for (int64_t i = 0; i < together * size; ++i) sums[i] = 0;
    for (int64_t k0 = 0; k0 < w.columns; k0 += kChunk) {
      const int64_t k1 = k0 + kChunk < w.columns ? k0 + kChunk : w.columns;
#if defined(__AVX2__)
      if constexpr (sizeof(C) == 4) {
        if (M == 1 && together == 2) {
          direct<1, 2, W>(w, n, x, k0, k1, sums, size);
          continue;
        }
        if (M <= kDirectRows) {
          with_rows(int(M), [&](auto r) {
            if constexpr (decltype(r)::value <= kDirectRows) {
              direct<decltype(r)::value, 1, W>(w, n, x, k0, k1, sums, size);
            }
          });
          continue;
        }
      }
#endif
      for (int g = 0; g < together; ++g) {
        through_cache<W>(w, n + g * kWidth, tiles, x, k0, k1, sums + g * size);
      }
    }
    for (int g = 0; g < together; ++g) finish(sums + g * size, n + g * kWidth);
    panel += together;
  }
}

int64_t pack_groups(int64_t M) { return Tiles(M).count(); }

int64_t pack_size(int64_t M, int64_t columns) { return M * columns; }

void down(const MatrixView& w, const void* packed, int64_t M, int64_t begin, int64_t end, void* z) {
  with_number(w.number, [&](auto zero) {
    using C = Compute<decltype(zero)>;
    const Tiles tiles(M);
    const auto pack_z = [&](const C* sums, int64_t n) {
      const int64_t width = w.rows - n < kWidth ? w.rows - n : kWidth;
      for (int64_t t = 0; t < tiles.count(); ++t) {
        C* const out = tiles.x(static_cast<C*>(z), t, w.rows) + n * tiles.rows(t);
        const C* const in = sums + tiles.begin(t) * kWidth;
        for (int i = 0; i < tiles.rows(t); ++i) {
          for (int64_t r = 0; r < width; ++r) out[r * tiles.rows(t) + i] = in[i * kWidth + r];
        }
      }
    };
    products<decltype(zero)>(w, static_cast<const C*>(packed), M, begin, end, pack_z);
  });
}

void up(const MatrixView& w, const void* z, int64_t begin, int64_t end, const LinearResult& y) {
  with_number(w.number, [&](auto zero) {
    using C = Compute<decltype(zero)>;
    products<decltype(zero)>(
        w, static_cast<const C*>(z), y.rows, begin, end,
        [&](const C* sums, int64_t n) { finish_rows(sums, n, kWidth, 0, y.rows, y); });
  });
}

}  // namespace

const LowRankLoops low_rank_loops{pack_groups, pack_size, pack_tiles, down, up};

}  // namespace prunelm::PRUNELM_ISA
