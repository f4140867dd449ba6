#include "memory.h"

namespace {

void low_rank_linear() {
  const int64_t M = 2, K = 35, N = 9, R = 11;
  const auto x = random(M * K), down = random(R * K), up = random(N * R), bias = random(N);
  std::vector<float> y(M * N, NAN);
  const LowRankLinear op{x.data(), down.data(), up.data(), bias.data(), y.data(), M, K, N, R};
  report("low_rank_linear",
         launched(launch_low_rank_linear, op, DType::float32, Activation::silu, nullptr), y);
}

}  // namespace

int main() {
  low_rank_linear();
  return ok ? 0 : 1;
}
