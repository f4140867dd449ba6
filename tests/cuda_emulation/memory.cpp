// Runs every kernel on small odd shapes, each tensor in a heap block of its exact size: built with
// AddressSanitizer it is a bounds checker, with ThreadSanitizer a race checker.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <random>
#include <vector>

#include "cuda/launch.h"

using namespace prunelm::cuda;

namespace {

std::vector<float> random(int64_t size) {
  static std::mt19937 generator(0);
  std::normal_distribution<float> normal;
  std::vector<float> out(size);
  for (float& x : out) x = normal(generator);
  return out;
}

bool ok = true;

void report(const char* name, const char* error, const std::vector<float>& out) {
  for (const float x : out) {
    if (x != x) error = "an element is NaN";
  }
  if (error) std::fprintf(stderr, "%s: %s\n", name, error);
  ok = ok && !error;
}

void block_sparse_linear() {
  const int64_t M = 3, K = 7, N = 37, bn = 16, bk = 4;
  const std::vector<int32_t> crow{0, 2, 2, 3}, col{0, 1, 1};
  const auto x = random(M * K), values = random(3 * bn * bk), bias = random(N);
  std::vector<float> y(M * N, NAN);
  const BlockSparseLinear op{
      x.data(), values.data(), crow.data(), col.data(), bias.data(), y.data(), M, K, N, bn, bk};
  report("block_sparse_linear",
         launch_block_sparse_linear(op, DType::float32, Activation::gelu, nullptr), y);

  std::vector<float> grad_x(M * K, NAN), grad_values(values.size(), NAN);
  BlockSparseGradient gradient{
      y.data(), x.data(), values.data(), crow.data(), col.data(), grad_x.data(), M, K, N, bn,
      bk,       3};
  report("grad_x", launch_block_sparse_linear_grad_x(gradient, nullptr), grad_x);
  gradient.out = grad_values.data();
  report("grad_values", launch_block_sparse_linear_grad_values(gradient, nullptr), grad_values);
}

void low_rank_linear() {
  const int64_t M = 2, K = 35, N = 9, R = 11;
  const auto x = random(M * K), down = random(R * K), up = random(N * R), bias = random(N);
  std::vector<float> y(M * N, NAN);
  const LowRankLinear op{x.data(), down.data(), up.data(), bias.data(), y.data(), M, K, N, R};
  report("low_rank_linear", launch_low_rank_linear(op, DType::float32, Activation::silu, nullptr),
         y);
}

void beam_step(Prune prune) {
  const int64_t B = 1, W = 3, V = 37, L = 4;  // blocks share nothing: one is enough
  const auto score = random(B * W), rows = random(L * V), weight = random(B), reward = random(B);
  auto logits = random(B * W * V);
  logits[V + 3] = NAN;  // the flag for it is shared, too
  const std::vector<int64_t> row{0, 3, 1}, slot{1, 0, 0};
  std::vector<float> out(B * W, NAN), parts(B * W * 2, NAN);
  std::vector<int64_t> parent(B * W), token(B * W);
  auto bad = std::make_unique<bool[]>(B);
  BeamStep op{};
  op.score = score.data();
  op.am_logits = logits.data();
  op.slot = slot.data();
  op.token_reward = reward.data();
  op.terms[0] = {rows.data(), row.data(), weight.data(), L, DType::float32};
  op.term_count = op.silent_count = 1;
  op.temperature = 1.5;
  op.blank_penalty = 0.5;
  op.prune = prune;
  op.weigh_blank = true;
  op.B = B;
  op.W = W;
  op.V = V;
  op.new_score = out.data();
  op.parent = parent.data();
  op.token = token.data();
  op.parts = parts.data();
  op.bad = bad.get();
  report("beam_step", launch_beam_step(op, DType::float32, DType::float32, nullptr), out);
  report("beam_step's parts", nullptr, parts);
}

}  // namespace

int main() {
  block_sparse_linear();
  low_rank_linear();
  for (const Prune prune : {Prune::late, Prune::early, Prune::after}) beam_step(prune);
  return ok ? 0 : 1;
}
