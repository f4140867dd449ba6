// csrc/cuda/matrix.cuh on the CPU: lanes put their fragments where the warp can see them.
#pragma once

#include <type_traits>

namespace prunelm::cuda {

// Element (row, column) of the fragments in `words`, two to a word, as they lie over the lanes.
template <typename T>
float fragment_element(const ::cuda_emulation::Warp& warp, int first_word, int row, int column,
                       bool rows_over_lanes) {
  // The left operand has its rows over the lanes' groups, the right one its columns.
  const int over = rows_over_lanes ? row : column, along = rows_over_lanes ? column : row;
  const int lane = over % 8 * 4 + along % 8 / 2;
  const int word = rows_over_lanes ? over / 8 + 2 * (along / 8) : along / 8;
  T two[2];
  std::memcpy(two, &warp.fragments[lane][first_word + word], sizeof(two));
  return to_float(two[along % 2]);
}

template <typename T>
void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  ::cuda_emulation::Warp& warp = ::cuda_emulation::here.warp();
  const int lane = int(::cuda_emulation::here.lane());
  std::memcpy(warp.fragments[lane], a, sizeof(a));
  std::memcpy(warp.fragments[lane] + 4, b, sizeof(b));
  warp.barrier.arrive_and_wait();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      d[i] += fragment_element<T>(warp, 0, row, k, true) *
              fragment_element<T>(warp, 4, k, column, false);
    }
  }
  warp.barrier.arrive_and_wait();
}

template <int kMatrices, bool kTransposed>
void load_matrices(uint32_t* to, const void* row) {
  ::cuda_emulation::Warp& warp = ::cuda_emulation::here.warp();
  const int lane = int(::cuda_emulation::here.lane());
  if (lane < 8 * kMatrices && reinterpret_cast<uintptr_t>(row) % 16) {
    throw std::runtime_error("a misaligned row of a matrix");
  }
  warp.slot[lane] = reinterpret_cast<uintptr_t>(row);
  warp.barrier.arrive_and_wait();
  for (int i = 0; i < kMatrices; ++i) {
    uint16_t two[2];
    for (int j = 0; j < 2; ++j) {
      const int at = lane / 4, pair = lane % 4 * 2 + j;
      const auto* from =
          reinterpret_cast<const uint16_t*>(warp.slot[8 * i + (kTransposed ? pair : at)]);
      two[j] = from[kTransposed ? at : pair];
    }
    std::memcpy(to + i, two, sizeof(two));
  }
  warp.barrier.arrive_and_wait();
}

inline void ldmatrix_x4(uint32_t (&to)[4], const void* row) { load_matrices<4, false>(to, row); }
inline void ldmatrix_x4_trans(uint32_t (&to)[4], const void* row) {
  load_matrices<4, true>(to, row);
}
inline void ldmatrix_x2(uint32_t (&to)[2], const void* row) { load_matrices<2, false>(to, row); }

}  // namespace prunelm::cuda
