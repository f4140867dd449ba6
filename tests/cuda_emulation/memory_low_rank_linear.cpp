#include "memory.h"

namespace {

template <typename T>
void low_rank_linear(const char* name, int64_t M, int64_t K, int64_t N, int64_t R) {
  const DType dtype = sizeof(T) == 4 ? DType::float32 : DType::bfloat16;
  const auto x = as<T>(random(M * K)), down = as<T>(random(R * K));
  const auto up = as<T>(random(N * R)), bias = as<T>(random(N));
  auto y = as<T>(std::vector<float>(M * N, NAN));
  LowRankLinear op{x.data(), down.data(), up.data(), bias.data(), y.data(), nullptr, M, K, N, R};
  std::vector<float> workspace(low_rank_linear_workspace(op, dtype), NAN);
  if (!workspace.empty()) op.workspace = workspace.data();
  const char* error = launched(launch_low_rank_linear, op, dtype, Activation::silu, nullptr);
  std::vector<float> wide;
  for (const T one : y) wide.push_back(widen(one));
  report(name, error, wide);
}

}  // namespace

int main() {
  cuda_emulation::multiprocessors = 2;
  low_rank_linear<float>("general", 1, 9, 3, 3500);

  // One cluster of two blocks; more chunks of K than stages; more columns than have room at once.
  cuda_emulation::largest_cluster = 2;
  cuda_emulation::most_shared = 30 * 1024;
  low_rank_linear<float>("cluster", 3, 644, 100, 11);
  cuda_emulation::most_shared = 227 * 1024;
  low_rank_linear<__nv_bfloat16>("wide cluster", 9, 136, 37, 144);

  cuda_emulation::largest_cluster = 0;
  low_rank_linear<float>("pair", 3, 840, 35, 11);
  low_rank_linear<__nv_bfloat16>("pair of a rank beyond clusters", 3, 40, 35, 257);
  return ok ? 0 : 1;
}
