// What the kernels of low_rank_linear.cu do in a block: a part of z = x down^T, and columns of y
// from z. Weights are the 16 rows of a matrix instruction, rows of x its 8 columns.
#pragma once

#include "cuda/async_copy.cuh"
#include "cuda/device.cuh"
#include "cuda/matrix.cuh"

namespace prunelm::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
constexpr int kStages = 4;  // chunks of x and down on their way
constexpr int kTile = 16;   // rows of a weight that a matrix instruction takes

template <typename T>
constexpr int kUnit = 16 / sizeof(T);  // elements that are copied at once
template <typename T>
constexpr int kStep = 32 / sizeof(T);  // columns that `multiply` takes
// Columns of a chunk, for 1 or 2 tiles of down a warp: 40 KiB a chunk at R = 256, M = 64.
template <typename T, int kTiles>
constexpr int kDepth = (kTiles == 1 ? 256 : 128) / sizeof(T);

// A row of `columns` in shared memory has an odd number of units: 8 rows lie in different banks.
template <typename T>
__host__ __device__ constexpr int row_stride(int columns) {
  return columns + kUnit<T>;
}

template <typename T>
struct alignas(4 * sizeof(T)) Quad {
  T value[4];
};

// sum[i][j] += left[16 rows of i] * right[8 rows of j]^T over kStep columns.
template <typename T, int kTiles, int kCols>
__device__ void multiply(float (&sum)[kTiles][kCols][4], const T* left, int left_stride,
                         const T* right, int right_stride) {
  const int lane = threadIdx.x % kWarp;
  if constexpr (sizeof(T) == 2) {
    uint32_t b[kCols][2];
    if constexpr (kCols == 1) {
      ldmatrix_x2(b[0], right + lane % 8 * right_stride + lane / 8 % 2 * 8);
    } else {
#pragma unroll
      for (int j = 0; j < kCols; j += 2) {
        uint32_t two[4];
        const int row = 8 * j + lane % 8 + lane / 16 * 8;
        ldmatrix_x4(two, right + row * right_stride + lane / 8 % 2 * 8);
        b[j][0] = two[0], b[j][1] = two[1], b[j + 1][0] = two[2], b[j + 1][1] = two[3];
      }
    }
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      uint32_t a[4];
      ldmatrix_x4(a, left + (kTile * i + lane % 16) * left_stride + lane / 16 * 8);
#pragma unroll
      for (int j = 0; j < kCols; ++j) mma_16x8x16<T>(sum[i][j], a, b[j]);
    }
  } else {
    const int row = lane / 4, column = lane % 4 * 2;
#pragma unroll
    for (int k = 0; k < kStep<T>; k += 4) {
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        Quad<T> a[2];
        for (int h = 0; h < 2; ++h) {
          const T* at = left + (kTile * i + row + 8 * h) * left_stride + k;
          a[h] = *reinterpret_cast<const Quad<T>*>(at);
        }
#pragma unroll
        for (int j = 0; j < kCols; ++j) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const T* at = right + (8 * j + column + h) * right_stride + k;
            const auto b = *reinterpret_cast<const Quad<T>*>(at);
            for (int e = 0; e < 4; ++e) {
              sum[i][j][h] += a[0].value[e] * b.value[e];
              sum[i][j][2 + h] += a[1].value[e] * b.value[e];
            }
          }
        }
      }
    }
  }
}

// Begins to copy a unit from a row of which `left` elements remain, zeros for what lies beyond it;
// `valid` is where something does, and both addresses are aligned to kBytes.
template <int kBytes, typename T>
__device__ void copy_unit(T* to, const T* from, int64_t left, const T* valid) {
  constexpr int elements = kBytes / int{sizeof(T)};
  for (int e = 0; e < kUnit<T>; e += elements) {
    cp_async<kBytes>(to + e, e < left ? from + e : valid, e < left);
  }
}

// Begins to copy `rows` rows and `columns` columns of a matrix [height, width] to shared memory,
// zeros for what lies beyond it.
template <typename T>
__device__ void copy_tile(T* to, const T* matrix, int64_t height, int64_t width, int64_t first_row,
                          int rows, int64_t first_column, int columns) {
  const auto aligned_to = [&](int bytes) {
    return (width * sizeof(T) | reinterpret_cast<uint64_t>(matrix)) % bytes == 0;
  };
  const bool wide = aligned_to(16), narrow = aligned_to(4);
  const int units = columns / kUnit<T>;
  int row = threadIdx.x / units, unit = threadIdx.x % units;
  while (row < rows) {
    const int64_t column = first_column + unit * kUnit<T>;
    const int64_t left = first_row + row < height ? width - column : 0;
    T* at = to + row * row_stride<T>(columns) + unit * kUnit<T>;
    const T* from = matrix + (first_row + row) * width + column;
    if (wide) {
      copy_unit<16>(at, from, left, matrix);
    } else if (narrow) {
      copy_unit<4>(at, from, left, matrix);
    } else {
      for (int e = 0; e < kUnit<T>; ++e) store(at + e, e < left ? to_float(from[e]) : 0.0f);
    }
    row += kThreads / units;
    unit += kThreads % units;
    if (unit >= units) unit -= units, ++row;
  }
}

// What a block computes of z: rows [first_rank, first_rank + rank_rows) of down, 8 kCols rows of x
// from m0 on, and columns [k0, k0 + part).
struct Slice {
  int64_t m0, first_rank, k0, part;
  int rank_rows;
};

// Warps stand side by side along R, each with kTiles tiles; so many groups of them share out each
// chunk, and each leaves a part of z: [groups, 8 kCols, rank_rows], in rows of part_stride.
__host__ __device__ constexpr int warp_groups(int rank_rows, int tiles) {
  int groups = kWarps;
  while (groups > 1 && kWarps / groups * tiles * kTile < rank_rows) groups /= 2;
  return groups;
}
__host__ __device__ constexpr int part_stride(int rank_rows) { return rank_rows + 4; }

// Leaves the block's parts of z at `memory`, where the chunks were; `behind` begins copies that
// shall arrive after the first chunks. All threads have passed a barrier before the parts are
// written, none after.
template <typename T, int kTiles, int kCols, typename Behind>
__device__ void shrink(const LowRankLinear& op, const Slice& slice, unsigned char* memory,
                       Behind behind) {
  constexpr int depth = kDepth<T, kTiles>, stride = row_stride<T>(depth);
  T* ring = reinterpret_cast<T*>(memory);
  const int64_t chunk_size = (slice.rank_rows + 8 * kCols) * stride;
  const int64_t left = op.K - slice.k0;
  const int chunks = int(((left < slice.part ? left : slice.part) + depth - 1) / depth);
  const auto copy_chunk = [&](int chunk) {
    T* down = ring + chunk % kStages * chunk_size;
    const int64_t k = slice.k0 + int64_t{chunk} * depth;
    copy_tile(down, static_cast<const T*>(op.down), op.R, op.K, slice.first_rank, slice.rank_rows,
              k, depth);
    copy_tile(down + slice.rank_rows * stride, static_cast<const T*>(op.x), op.M, op.K, slice.m0,
              8 * kCols, k, depth);
  };
  for (int chunk = 0; chunk < kStages; ++chunk) {
    if (chunk < chunks) copy_chunk(chunk);
    cp_async_commit();
  }
  behind();
  cp_async_commit();

  const int groups = warp_groups(slice.rank_rows, kTiles), along_rank = kWarps / groups;
  const int warp = threadIdx.x / kWarp, group = warp / along_rank;
  const int first_row = warp % along_rank * kTiles * kTile;
  float sum[kTiles][kCols][4] = {};
  for (int chunk = 0; chunk < chunks; ++chunk) {
    // The group of `behind` lies between those of the first chunks and of the others.
    if (chunk < kStages) {
      cp_async_wait<kStages>();
    } else {
      cp_async_wait<kStages - 1>();
    }
    __syncthreads();
    const T* down = ring + chunk % kStages * chunk_size;
    if (first_row < slice.rank_rows) {
      for (int k = group * kStep<T>; k < depth; k += groups * kStep<T>) {
        multiply(sum, down + first_row * stride + k, stride, down + slice.rank_rows * stride + k,
                 stride);
      }
    }
    if (chunk + kStages < chunks) {
      __syncthreads();
      copy_chunk(chunk + kStages);
    }
    cp_async_commit();
  }
  cp_async_wait<0>();
  __syncthreads();

  if (first_row >= slice.rank_rows) return;
  float* parts = reinterpret_cast<float*>(memory);
  const int lane = threadIdx.x % kWarp;
  for (int i = 0; i < kTiles; ++i) {
    for (int j = 0; j < kCols; ++j) {
      for (int e = 0; e < 4; ++e) {
        const int m = 8 * j + lane % 4 * 2 + e % 2;
        const int r = first_row + kTile * i + lane / 4 + e / 2 * 8;
        parts[(group * 8 * kCols + m) * part_stride(slice.rank_rows) + r] = sum[i][j][e];
      }
    }
  }
}

// Begins to copy rows of up and of bias, from `n0` on.
template <typename T>
__device__ void copy_up(const LowRankLinear& op, T* up, float* bias, int64_t n0, int columns,
                        int rank_rows) {
  copy_tile(up, static_cast<const T*>(op.up), op.N, op.R, n0, columns, 0, rank_rows);
  for (int n = threadIdx.x; n < columns; n += kThreads) {
    const bool biased = op.bias && n0 + n < op.N;
    bias[n] = biased ? to_float(static_cast<const T*>(op.bias)[n0 + n]) : 0.0f;
  }
}

// y [8 kCols rows from m0 on, columns [n0, end)]; z, and `columns` rows of up and of bias, are in
// shared memory.
template <typename T, int kCols>
__device__ void expand(const LowRankLinear& op, Activation activation, const T* z, const T* up,
                       const float* bias, int64_t m0, int64_t n0, int64_t end, int columns,
                       int rank_rows) {
  constexpr int wide = kCols > 1 ? kCols / 2 : 1;  // columns of x that a warp takes at once
  const int tiles = columns / kTile, stride = row_stride<T>(rank_rows);
  const int lane = threadIdx.x % kWarp;
  for (int i = threadIdx.x / kWarp; i < tiles * (kCols / wide); i += kWarps) {
    const int tile = i % tiles, first = i / tiles * wide * 8;
    const T* left = up + tile * kTile * stride;
    const T* right = z + first * stride;
    float even[1][wide][4] = {}, odd[1][wide][4] = {};  // two chains, to wait half as long
    for (int k = 0; k < rank_rows; k += 2 * kStep<T>) {
      multiply(even, left + k, stride, right + k, stride);
      if (k + kStep<T> < rank_rows) {
        multiply(odd, left + k + kStep<T>, stride, right + k + kStep<T>, stride);
      }
    }
#pragma unroll
    for (int j = 0; j < wide; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int64_t m = m0 + first + 8 * j + lane % 4 * 2 + e % 2;
        const int row = tile * kTile + lane / 4 + e / 2 * 8;
        if (m >= op.M || n0 + row >= end) continue;
        const float sum = even[0][j][e] + odd[0][j][e] + bias[row];
        store(static_cast<T*>(op.y) + m * op.N + n0 + row, activate(sum, activation));
      }
    }
  }
}

}  // namespace
}  // namespace prunelm::cuda
