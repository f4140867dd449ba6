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

// The kernel in tiles: `multiprocessors` says how many warps share a thread block,
// `shared` how many chunks of x fit.
template <typename T>
void tiles(int64_t M, int64_t K, int64_t N, int64_t bn, int64_t bk, int capability,
           int multiprocessors, size_t shared) {
  cuda_emulation::compute_capability = capability;
  cuda_emulation::multiprocessors = multiprocessors;
  cuda_emulation::most_shared = shared;
  const int64_t rows = (N + bn - 1) / bn, columns = (K + bk - 1) / bk;
  std::vector<int32_t> crow{0}, col;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = row % 2; column < columns; column += 1 + row) {
      col.push_back(int32_t(column));
    }
    crow.push_back(int32_t(col.size()));
  }
  col.shrink_to_fit();
  crow.shrink_to_fit();
  const DType dtype = sizeof(T) == 4 ? DType::float32 : DType::bfloat16;
  const auto x = as<T>(random(M * K)), bias = as<T>(random(N));
  const auto values = as<T>(random(int64_t(col.size()) * bn * bk));
  auto y = as<T>(std::vector<float>(M * N, NAN));
  BlockSparseLinear op{
      x.data(), values.data(), crow.data(), col.data(), bias.data(), y.data(), M, K, N, bn, bk};
  const int64_t floats = block_sparse_linear_workspace(op, dtype);
  std::vector<float> workspace(floats, NAN);
  if (floats) op.workspace = workspace.data();
  const char* error = launched(launch_block_sparse_linear, op, dtype, Activation::relu, nullptr);
  std::vector<float> wide;
  for (const T one : y) wide.push_back(widen(one));
  report("tiles", error, wide);
}

}  // namespace

int main() {
  block_sparse_linear();
  constexpr size_t kAll = 227 * 1024;
  tiles<__nv_bfloat16>(5, 136, 72, 16, 16, 90, 16, kAll);  // two warps
  tiles<float>(9, 1280, 16, 16, 8, 90, 132, kAll);         // 20 steps through a ring of 16
  tiles<__nv_bfloat16>(3, 1160, 40, 32, 64, 90, 132,
                       11 * 1024);                         // 3 chunks a slice, 2 of which fit
  tiles<__nv_bfloat16>(3, 40, 24, 16, 16, 80, 132, kAll);  // no cluster
  // Two warps; 5 chunks, of which 2 fit.
  tiles<__nv_bfloat16>(513, 264, 40, 32, 32, 80, 11, 54 * 1024);
  tiles<__nv_bfloat16>(513, 208, 40, 32, 32, 90, 132, 46 * 1024);  // multicast
  return ok ? 0 : 1;
}
