// What the CUDA registrations share: torch's types as the launchers' types, and the current stream.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "cuda/launch.h"

// In every CUDA build of torch and in no CPU build; weak, so that the extension loads beside both.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device,
                                                                            void** stream);

namespace prunelm::cuda {

inline DType dtype_of(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::Double:
      return DType::float64;
    case ScalarType::Half:
      return DType::float16;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    default:
      refuse(name, "float32, float64, float16 or bfloat16",
             torch::headeronly::toString(tensor.scalar_type()));
  }
}

inline void check_device(const char* name, const Tensor& tensor, const Tensor& first) {
  if (!tensor.is_cuda() || tensor.get_device_index() != first.get_device_index()) {
    refuse(name, "device cuda:" + std::to_string(first.get_device_index()),
           tensor.is_cuda() ? "cuda:" + std::to_string(tensor.get_device_index()) : "another one");
  }
}

// While it lives, a tensor's device is the current one; `stream` is torch's current stream on it.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    if (aoti_torch_get_current_cuda_stream == nullptr) {
      throw std::runtime_error("prunelm: CUDA tensors need a CUDA build of torch");
    }
    if (aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) != 0) {
      throw std::runtime_error("prunelm: torch gave no CUDA stream");
    }
  }
  void* stream = nullptr;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

inline Tensor packed(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// x [..., K] seen as [M, K].
inline int64_t rows_of(const Tensor& x) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) rows *= x.size(i);
  return rows;
}

// An empty [..., N] for x [..., K].
inline Tensor empty_result(const Tensor& x, int64_t N) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = N;
  return torch::stable::new_empty(x, shape);
}

inline void check_launched(const char* op, const char* error) {
  if (error) throw std::runtime_error(std::string(op) + ": CUDA: " + error);
}

}  // namespace prunelm::cuda
