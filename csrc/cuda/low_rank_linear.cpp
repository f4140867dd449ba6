// Low-rank linear on CUDA; contract in prunelm/ops/low_rank_linear.py.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "cuda/binding.h"

namespace prunelm::cuda {
namespace {

Tensor low_rank_linear_cuda(const Tensor& x_given, const Tensor& down_given, const Tensor& up_given,
                            const std::optional<Tensor>& bias, int64_t activation) {
  const LowRankShape s = check_low_rank_linear(x_given, down_given, up_given, bias, activation);
  check_dtype_of("down", down_given, "x", x_given);
  check_device("down", down_given, x_given);
  check_device("up", up_given, x_given);
  if (bias) check_device("bias", *bias, x_given);
  const OnDeviceOf device(x_given);
  const Tensor x = packed(x_given), down = packed(down_given), up = packed(up_given);
  Tensor y = empty_result(x, s.N);
  LowRankLinear op{x.data_ptr(),  down.data_ptr(),
                   up.data_ptr(), bias ? bias->data_ptr() : nullptr,
                   y.data_ptr(),  nullptr,
                   rows_of(x),    s.K,
                   s.N,           s.R};
  const DType dtype = dtype_of("x", x);
  std::optional<Tensor> workspace;
  if (const int64_t size = low_rank_linear_workspace(op, dtype)) {
    workspace = torch::stable::new_empty(x, {size}, ScalarType::Float);
    op.workspace = static_cast<float*>(workspace->data_ptr());
  }
  check_launched("low_rank_linear",
                 launch_low_rank_linear(op, dtype, Activation(int(activation)), device.stream));
  return y;
}

}  // namespace
}  // namespace prunelm::cuda

STABLE_TORCH_LIBRARY_IMPL(prunelm, CUDA, m) {
  m.impl("low_rank_linear", TORCH_BOX(&prunelm::cuda::low_rank_linear_cuda));
}
