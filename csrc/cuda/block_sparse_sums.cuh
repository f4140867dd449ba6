// A warp's sums of a block-sparse product: 32 outputs by kRows rows of x, in its lanes' registers.
// Outputs are two strips of 16 or one of 32. A step is 32 bytes of x's columns: 16 columns of
// 16-bit numbers, which go through matrix instructions, or 8 of float32, which do not.
//
// Both kinds offer
//   offset(column, piece)            where 16 bytes of a column's outputs lie among a step's
//   weights multiply<strip>(weights, x)      a step: weights as `offset` lays them, x by rows of
//   kPitch bytes each(run)                        run(output, row, sum) for each sum of this thread
#pragma once

#include "cuda/device.cuh"
#include "cuda/matrix.cuh"

namespace prunelm::cuda::tiles {

constexpr int kOutputs = 32;
constexpr int kPitch = 144;  // bytes between rows of x: 128, and 16 more to lie in other banks

template <typename T, int kStrip, int kRows>
class Sums {
 public:
  // Eight columns are read at once: they lie in all banks.
  __device__ static int offset(int column, int piece) {
    const int turned = kStrip == 32 ? piece ^ (column >> 1 & 3) : piece ^ (column >> 2 & 1);
    return column * kStrip * 2 + turned * 16;
  }

  // Weights are the 16-high operand, rows of x the 8-wide one, so that few rows waste little.
  template <int strip>
  __device__ void multiply(const unsigned char* weights, const unsigned char* x) {
    const int lane = int(threadIdx.x) % kWarp, matrix = lane / 8, line = lane % 8;
    uint32_t a[kHalves][4];
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      ldmatrix_x4_trans(a[half], weights + offset(line + matrix / 2 * 8, half * 2 + matrix % 2));
    }
    if constexpr (kTiles == 1) {
      uint32_t b[2];
      ldmatrix_x2(b, x + line * kPitch + matrix % 2 * 16);
#pragma unroll
      for (int half = 0; half < kHalves; ++half) mma_16x8x16<T>(sums_[strip][half][0], a[half], b);
    } else {
#pragma unroll
      for (int pair = 0; pair < kTiles / 2; ++pair) {
        uint32_t b[4];
        ldmatrix_x4(b, x + (pair * 16 + matrix / 2 * 8 + line) * kPitch + matrix % 2 * 16);
        const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          mma_16x8x16<T>(sums_[strip][half][2 * pair], a[half], low);
          mma_16x8x16<T>(sums_[strip][half][2 * pair + 1], a[half], high);
        }
      }
    }
  }

  // Those of rows [kFrom, kTo), multiples of 8.
  template <int kFrom = 0, int kTo = kRows, typename Run>
  __device__ void each(Run run) const {
    const int lane = int(threadIdx.x) % kWarp;
#pragma unroll
    for (int strip = 0; strip < kOutputs / kStrip; ++strip) {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
#pragma unroll
        for (int tile = kFrom / 8; tile < kTo / 8; ++tile) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            run(strip * kStrip + half * 16 + lane / 4 + i / 2 * 8, tile * 8 + lane % 4 * 2 + i % 2,
                sums_[strip][half][tile][i]);
          }
        }
      }
    }
  }

 private:
  static constexpr int kHalves = kStrip / 16, kTiles = kRows / 8;
  float sums_[kOutputs / kStrip][kHalves][kTiles][4]{};
};

// A lane has one output of each strip; where a strip has 16, the two halves of the warp share the
// rows.
template <int kStrip, int kRows>
class Sums<float, kStrip, kRows> {
 public:
  __device__ static int offset(int column, int piece) { return column * kStrip * 4 + piece * 16; }

  template <int strip>
  __device__ void multiply(const unsigned char* weights, const unsigned char* x) {
    const int lane = int(threadIdx.x) % kWarp;
    const float* w = reinterpret_cast<const float*>(weights) + lane % kStrip;
#pragma unroll
    for (int k = 0; k < 8; k += 4) {
      const float w0 = w[k * kStrip], w1 = w[(k + 1) * kStrip];
      const float w2 = w[(k + 2) * kStrip], w3 = w[(k + 3) * kStrip];
#pragma unroll
      for (int i = 0; i < kRows / kShares; ++i) {
        const float4 row = *reinterpret_cast<const float4*>(x + row_of(lane, i) * kPitch + k * 4);
        float& sum = sums_[strip][i];
        sum = fmaf(w0, row.x, sum);
        sum = fmaf(w1, row.y, sum);
        sum = fmaf(w2, row.z, sum);
        sum = fmaf(w3, row.w, sum);
      }
    }
  }

  template <int kFrom = 0, int kTo = kRows, typename Run>
  __device__ void each(Run run) const {
    const int lane = int(threadIdx.x) % kWarp;
#pragma unroll
    for (int strip = 0; strip < kOutputs / kStrip; ++strip) {
#pragma unroll
      for (int i = kFrom / kShares; i < kTo / kShares; ++i) {
        run(strip * kStrip + lane % kStrip, row_of(lane, i), sums_[strip][i]);
      }
    }
  }

 private:
  static constexpr int kShares = kWarp / kStrip;
  __device__ static int row_of(int lane, int i) { return i * kShares + lane / kStrip; }
  float sums_[kOutputs / kStrip][kRows / kShares]{};
};

}  // namespace prunelm::cuda::tiles
