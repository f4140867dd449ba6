// A warp's matrix instructions (sm_80). Fragments lie over its lanes as the PTX manual draws them:
// with g = lane / 4 and t = lane % 4, of
//   a 16x16 left operand      a[0] row g, a[1] row g + 8, columns 2t and 2t + 1;
//                             a[2], a[3] the same rows, columns 2t + 8 and 2t + 9;
//   a 16x8 right operand      b[0] rows 2t and 2t + 1, b[1] rows 2t + 8 and 2t + 9, column g;
//   a 16x8 result             d[0], d[1] row g, d[2], d[3] row g + 8, columns 2t and 2t + 1.
#pragma once

#include "cuda/device.cuh"

#ifdef CUDA_EMULATION
#include "matrix.h"
#else

namespace prunelm::cuda {

// d += a * b for __half or __nv_bfloat16, summed in float32.
template <typename T>
__device__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>);
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// Loads 8x8 matrices of 16-bit numbers: lane i names row i % 8 of matrix i / 8, 16 bytes of shared
// memory aligned to 16, and gets two neighbours of row g, columns 2t and 2t + 1, of each matrix;
// transposed, rows 2t and 2t + 1 of column g. Of ldmatrix_x2 only the lanes below 16 name rows.
__device__ inline void ldmatrix_x4(uint32_t (&to)[4], const void* row) {
  const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}
__device__ inline void ldmatrix_x4_trans(uint32_t (&to)[4], const void* row) {
  const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}
__device__ inline void ldmatrix_x2(uint32_t (&to)[2], const void* row) {
  const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(to[0]), "=r"(to[1])
               : "r"(from)
               : "memory");
}

}  // namespace prunelm::cuda

#endif
