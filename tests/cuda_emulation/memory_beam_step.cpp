#include "memory.h"

namespace {

struct Shape {
  int64_t W, V, most_shared;
  bool few;  // only the first two hypotheses live
};

void beam_step(Prune prune, const Shape& shape) {
  const int64_t B = 1, W = shape.W, V = shape.V, L = 4;  // utterances share nothing
  const auto rows = random(L * V), weight = random(B), reward = random(B);
  auto score = random(B * W), logits = random(B * W * V);
  logits[V + 3] = NAN;  // the flag for it is shared, too
  std::vector<int64_t> row(W, 3), slot(W, 0);
  row[0] = 0;
  row[W - 1] = 1;
  slot[0] = 1;
  for (int64_t w = 0; w < W && shape.few; ++w) slot[w] = w < 2 ? 0 : 3;
  if (shape.few) logits[V + 3] = 0;
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
  op.most_shared = shape.most_shared;
  const auto bytes = size_t(beam_step_workspace(op, DType::float32, DType::float32));
  auto workspace = std::make_unique<unsigned char[]>(bytes);
  op.workspace = workspace.get();
  report("beam_step", launched(launch_beam_step, op, DType::float32, DType::float32, nullptr), out);
  report("beam_step's parts", nullptr, parts);
  if (shape.few && bad[0]) report("beam_step", "saw a NaN that is not there", out);
}

}  // namespace

int main() {
  // A warp a hypothesis; a block each, with winners within a bound; rows in global memory; more
  // candidates than are listed.
  const Shape warps{3, 37, 1 << 16, false}, blocks{3, 521, 1 << 14, false};
  const Shape unstaged{3, 521, 0, false}, many{65, 523, 1 << 16, true};
  for (const Prune prune : {Prune::late, Prune::early, Prune::after}) {
    beam_step(prune, warps);
    beam_step(prune, blocks);
  }
  beam_step(Prune::late, unstaged);
  beam_step(Prune::late, many);
  return ok ? 0 : 1;
}
