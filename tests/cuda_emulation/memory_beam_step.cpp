#include "memory.h"

namespace {

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
  report("beam_step", launched(launch_beam_step, op, DType::float32, DType::float32, nullptr), out);
  report("beam_step's parts", nullptr, parts);
}

}  // namespace

int main() {
  for (const Prune prune : {Prune::late, Prune::early, Prune::after}) beam_step(prune);
  return ok ? 0 : 1;
}
