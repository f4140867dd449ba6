#include "memory.h"

namespace {

void block_sparse_linear() {
  const int64_t M = 3, K = 7, N = 37, bn = 16, bk = 4;
  const std::vector<int32_t> crow{0, 2, 2, 3}, col{0, 1, 1};
  const auto x = random(M * K), values = random(3 * bn * bk), bias = random(N);
  std::vector<float> y(M * N, NAN);
  const BlockSparseLinear op{
      x.data(), values.data(), crow.data(), col.data(), bias.data(), y.data(), M, K, N, bn, bk};
  report("block_sparse_linear",
         launched(launch_block_sparse_linear, op, DType::float32, Activation::gelu, nullptr), y);

  std::vector<float> grad_x(M * K, NAN), grad_values(values.size(), NAN);
  BlockSparseGradient gradient{
      y.data(), x.data(), values.data(), crow.data(), col.data(), grad_x.data(), M, K, N, bn,
      bk,       3};
  report("grad_x", launched(launch_block_sparse_linear_grad_x, gradient, nullptr), grad_x);
  gradient.out = grad_values.data();
  report("grad_values", launched(launch_block_sparse_linear_grad_values, gradient, nullptr),
         grad_values);
}

}  // namespace

int main() {
  block_sparse_linear();
  return ok ? 0 : 1;
}
