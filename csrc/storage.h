// Whether the memory that a tensor speaks of is there. torch lets a storage shrink under its
// tensors, which go on naming the old sizes.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <limits>

namespace prunelm {

// Bytes from a storage's begin to the end of a tensor in it; 0 for a tensor without numbers, the
// largest number where the true one does not fit.
inline int64_t bytes_needed(int64_t dim, const int64_t* sizes, const int64_t* strides,
                            int64_t offset, int64_t number_bytes) {
  int64_t last = offset, step = 0;
  bool overflows = false;
  for (int64_t i = 0; i < dim; ++i) {
    if (sizes[i] == 0) return 0;
    overflows |= __builtin_mul_overflow(sizes[i] - 1, strides[i], &step);
    overflows |= __builtin_add_overflow(last, step, &last);
  }
  overflows |= __builtin_add_overflow(last, 1, &last);
  overflows |= __builtin_mul_overflow(last, number_bytes, &last);
  return overflows ? std::numeric_limits<int64_t>::max() : last;
}

// False also where torch does not say.
inline bool storage_of(AtenTensorHandle tensor, int64_t* bytes, int64_t* offset) {
  return aoti_torch_get_storage_size(tensor, bytes) == AOTI_TORCH_SUCCESS &&
         aoti_torch_get_storage_offset(tensor, offset) == AOTI_TORCH_SUCCESS;
}

}  // namespace prunelm
