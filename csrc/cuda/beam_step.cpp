// One step of a beam search for every utterance; contract in prunelm/ops/beam_step.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/binding.h"

namespace prunelm::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> beam_step_cuda(
    const Tensor& score, const Tensor& am_logits, const std::vector<Tensor>& rows,
    const std::vector<Tensor>& row, const std::vector<Tensor>& weight,
    const std::optional<Tensor>& slot, const std::vector<int64_t>& silent,
    const std::optional<Tensor>& token_reward, double temperature, double blank_penalty,
    const std::string& prune, bool weigh_blank) {
  const BeamShape shape =
      check_beam_step(score, am_logits, rows, row, weight, slot, silent, token_reward, temperature);
  if (rows.size() > kMaxTerms) {
    refuse("terms", "at most " + std::to_string(kMaxTerms), std::to_string(rows.size()));
  }
  if (silent.size() > kMaxSilent) {
    refuse("silent", "at most " + std::to_string(kMaxSilent), std::to_string(silent.size()));
  }
  check_device("score", score, am_logits);
  if (slot) check_device("slot", *slot, am_logits);
  if (token_reward) check_device("token_reward", *token_reward, am_logits);

  BeamStep op{};
  op.score = score.data_ptr();
  op.am_logits = am_logits.data_ptr();
  op.slot = slot ? static_cast<const int64_t*>(slot->data_ptr()) : nullptr;
  op.token_reward = token_reward ? token_reward->data_ptr() : nullptr;
  for (size_t i = 0; i < rows.size(); ++i) {
    check_device("rows", rows[i], am_logits);
    check_device("row", row[i], am_logits);
    check_device("weight", weight[i], am_logits);
    op.terms[i] = {rows[i].data_ptr(), static_cast<const int64_t*>(row[i].data_ptr()),
                   weight[i].data_ptr(), rows[i].size(0), dtype_of("rows", rows[i])};
  }
  std::copy(silent.begin(), silent.end(), op.silent);
  op.term_count = int32_t(rows.size());
  op.silent_count = int32_t(silent.size());
  op.temperature = temperature;
  op.blank_penalty = blank_penalty;
  op.prune = Prune(int(prune_of(prune)));
  op.weigh_blank = weigh_blank;
  op.B = shape.B;
  op.W = shape.W;
  op.V = shape.V;

  const OnDeviceOf device(am_logits);
  const auto parts = int64_t(1 + rows.size());
  Tensor new_score = torch::stable::new_empty(score, {shape.B, shape.W});
  Tensor parent = torch::stable::new_empty(score, {shape.B, shape.W}, ScalarType::Long);
  Tensor token = torch::stable::new_empty(score, {shape.B, shape.W}, ScalarType::Long);
  Tensor new_parts = torch::stable::new_empty(score, {shape.B, shape.W, parts});
  Tensor bad = torch::stable::new_empty(score, {shape.B}, ScalarType::Bool);
  op.new_score = new_score.data_ptr();
  op.parent = static_cast<int64_t*>(parent.data_ptr());
  op.token = static_cast<int64_t*>(token.data_ptr());
  op.parts = new_parts.data_ptr();
  op.bad = static_cast<bool*>(bad.data_ptr());
  const DType logits_dtype = dtype_of("am_logits", am_logits);
  const DType score_dtype = dtype_of("score", score);
  const int64_t bytes = beam_step_workspace(op, logits_dtype, score_dtype);
  Tensor workspace = torch::stable::new_empty(score, {bytes}, ScalarType::Byte);
  op.workspace = workspace.data_ptr();
  check_launched("beam_step", launch_beam_step(op, logits_dtype, score_dtype, device.stream));
  return {new_score, parent, token, new_parts, bad};
}

}  // namespace
}  // namespace prunelm::cuda

STABLE_TORCH_LIBRARY_IMPL(prunelm, CUDA, m) {
  m.impl("beam_step", TORCH_BOX(&prunelm::cuda::beam_step_cuda));
}
