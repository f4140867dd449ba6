// Block-sparse linear on CUDA; contract in prunelm/ops/block_sparse_linear.py.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "cuda/binding.h"

namespace prunelm::cuda {
namespace {

// What crow and col hold stays unchecked here: reading it would synchronise.
void check_pattern_device(const Tensor& crow, const Tensor& col, const Tensor& first) {
  check_device("crow", crow, first);
  check_device("col", col, first);
}

Tensor bn_fastest(const Tensor& values) { return packed(torch::stable::transpose(values, 1, 2)); }

Tensor block_sparse_linear_cuda(const Tensor& x_given, const Tensor& values, const Tensor& crow,
                                const Tensor& col, const std::optional<Tensor>& bias,
                                int64_t out_features, int64_t activation,
                                const std::optional<Tensor>& gpu_index) {
  const BlockSparseShape s =
      check_block_sparse_linear(x_given, values, crow, col, bias, out_features, activation);
  check_dtype_of("values", values, "x", x_given);
  check_device("values", values, x_given);
  check_pattern_device(crow, col, x_given);
  if (bias) check_device("bias", *bias, x_given);
  const OnDeviceOf device(x_given);
  const Tensor x = packed(x_given), blocks = bn_fastest(values);
  Tensor y = empty_result(x, s.N);
  BlockSparseLinear op{};
  op.x = x.data_ptr();
  op.values = blocks.data_ptr();
  op.crow = static_cast<const int32_t*>(crow.data_ptr());
  op.col = static_cast<const int32_t*>(col.data_ptr());
  op.bias = bias ? bias->data_ptr() : nullptr;
  op.y = y.data_ptr();
  op.M = rows_of(x);
  op.K = s.K;
  op.N = s.N;
  op.bn = s.bn;
  op.bk = s.bk;
  if (gpu_index) {
    check_dtype("gpu_index", *gpu_index, ScalarType::Int);
    check_contiguous("gpu_index", *gpu_index);
    check_device("gpu_index", *gpu_index, x);
    const int64_t cut =
        (s.N + s.bn - 1) / s.bn * 9;  // how a GPU index begins (prunelm/gpu_index.py)
    if (gpu_index->numel() < cut) {
      refuse("gpu_index", "at least " + std::to_string(cut) + " numbers",
             std::to_string(gpu_index->numel()));
    }
    op.cut = static_cast<const int32_t*>(gpu_index->data_ptr());
  }
  const DType dtype = dtype_of("x", x);
  std::optional<Tensor> workspace;
  if (const int64_t floats = block_sparse_linear_workspace(op, dtype); floats > 0) {
    workspace = torch::stable::new_empty(x, {floats}, ScalarType::Float);
    op.workspace = static_cast<float*>(workspace->data_ptr());
  }
  check_launched("block_sparse_linear",
                 launch_block_sparse_linear(op, dtype, Activation(int(activation)), device.stream));
  return y;
}

BlockSparseGradient gradient(const Tensor& grad, const Tensor& crow, const Tensor& col,
                             const BlockSparseShape& s) {
  check_dtype("grad", grad, ScalarType::Float);
  check_pattern_device(crow, col, grad);
  BlockSparseGradient op{};
  op.grad = static_cast<const float*>(grad.data_ptr());
  op.crow = static_cast<const int32_t*>(crow.data_ptr());
  op.col = static_cast<const int32_t*>(col.data_ptr());
  op.M = rows_of(grad);
  op.K = s.K;
  op.N = s.N;
  op.bn = s.bn;
  op.bk = s.bk;
  op.nnz = col.size(0);
  return op;
}

Tensor block_sparse_linear_grad_x_cuda(const Tensor& grad_given, const Tensor& values,
                                       const Tensor& crow, const Tensor& col, int64_t in_features) {
  const BlockSparseShape s = check_block_sparse_grad(grad_given, values, crow, col, in_features);
  check_dtype("values", values, ScalarType::Float);
  check_device("values", values, grad_given);
  const OnDeviceOf device(grad_given);
  const Tensor grad = packed(grad_given), blocks = bn_fastest(values);
  Tensor out = empty_result(grad, s.K);
  BlockSparseGradient op = gradient(grad, crow, col, s);
  op.values = static_cast<const float*>(blocks.data_ptr());
  op.out = static_cast<float*>(out.data_ptr());
  check_launched("block_sparse_linear_grad_x",
                 launch_block_sparse_linear_grad_x(op, device.stream));
  return out;
}

Tensor block_sparse_linear_grad_values_cuda(const Tensor& grad_given, const Tensor& x_given,
                                            const Tensor& crow, const Tensor& col, int64_t bn,
                                            int64_t bk) {
  const BlockSparseShape s = check_block_sparse_grad_values(grad_given, x_given, crow, col, bn, bk);
  check_dtype("x", x_given, ScalarType::Float);
  check_device("x", x_given, grad_given);
  const OnDeviceOf device(grad_given);
  const Tensor grad = packed(grad_given), x = packed(x_given);
  Tensor blocks = torch::stable::new_empty(grad, {col.size(0), bk, bn});
  BlockSparseGradient op = gradient(grad, crow, col, s);
  op.x = static_cast<const float*>(x.data_ptr());
  op.out = static_cast<float*>(blocks.data_ptr());
  check_launched("block_sparse_linear_grad_values",
                 launch_block_sparse_linear_grad_values(op, device.stream));
  return torch::stable::transpose(blocks, 1, 2);
}

}  // namespace
}  // namespace prunelm::cuda

STABLE_TORCH_LIBRARY_IMPL(prunelm, CUDA, m) {
  m.impl("block_sparse_linear", TORCH_BOX(&prunelm::cuda::block_sparse_linear_cuda));
  m.impl("block_sparse_linear_grad_x", TORCH_BOX(&prunelm::cuda::block_sparse_linear_grad_x_cuda));
  m.impl("block_sparse_linear_grad_values",
         TORCH_BOX(&prunelm::cuda::block_sparse_linear_grad_values_cuda));
}
