// Schemas of torch.ops.prunelm.* and the module's host-side functions. Implementations register
// themselves from cpu/<op>.cpp and cuda/<op>.cpp; contracts stand in prunelm/ops/<op>.py.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>

#include "cpu/direct.h"
#include "cpu/instruction_set.h"

namespace py = pybind11;

STABLE_TORCH_LIBRARY(prunelm, m) {
  m.def(
      "block_sparse_linear(Tensor x, Tensor values, Tensor crow, Tensor col, Tensor? bias, "
      "int out_features, int activation, Tensor? gpu_index=None) -> Tensor");
  // The same call without the work: what is left to blame on torch, for benchmarks.
  m.def(
      "block_sparse_linear_empty(Tensor x, Tensor values, Tensor crow, Tensor col, Tensor? bias, "
      "int out_features, int activation, Tensor? gpu_index=None) -> Tensor");
  m.def(
      "block_sparse_linear_grad_x(Tensor grad, Tensor values, Tensor crow, Tensor col, "
      "int in_features) -> Tensor");
  m.def(
      "block_sparse_linear_grad_values(Tensor grad, Tensor x, Tensor crow, Tensor col, int bn, "
      "int bk) -> Tensor");
  m.def(
      "low_rank_linear(Tensor x, Tensor down, Tensor up, Tensor? bias, int activation) -> Tensor");
  m.def(
      "low_rank_linear_blocks(Tensor x, Tensor down_values, Tensor down_crow, Tensor down_col, "
      "Tensor up_values, Tensor up_crow, Tensor up_col, Tensor? bias, int rank, int out_features, "
      "int activation) -> Tensor");
  m.def(
      "rnnt_loss(Tensor logits, Tensor targets, Tensor logit_lengths, Tensor target_lengths, "
      "int blank) -> (Tensor, Tensor)");
  m.def(
      "beam_step(Tensor score, Tensor am_logits, Tensor[] rows, Tensor[] row, Tensor[] weight, "
      "Tensor? slot, int[] silent, Tensor? token_reward, float temperature, float blank_penalty, "
      "str prune, bool weigh_blank) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "tree_attention(Tensor qkv, Tensor cos, Tensor sin, Tensor path, Tensor length, "
      "Tensor(a!) key, Tensor(b!) value) -> Tensor");
}

namespace prunelm {
void bind_prefix_tree(py::module_& m);
void bind_beam_step(py::module_& m);
void bind_block_sparse_linear(py::module_& m);
void bind_low_rank_linear(py::module_& m);
}  // namespace prunelm

PYBIND11_MODULE(_C, m) {
  prunelm::bind_prefix_tree(m);
  prunelm::look_up_torch();
  prunelm::bind_readable(m);
  prunelm::bind_beam_step(m);
  prunelm::bind_block_sparse_linear(m);
  prunelm::bind_low_rank_linear(m);
  m.def("build_information", [] {
    py::dict info;
    info["compiler"] = __VERSION__;
    info["cuda"] = bool(PRUNELM_WITH_CUDA);
    info["instruction_set"] = prunelm::instruction_set_name(prunelm::instruction_set());
    py::list sets;
    for (const auto set : prunelm::kInstructionSets) {
      if (set <= prunelm::best_instruction_set()) sets.append(prunelm::instruction_set_name(set));
    }
    info["instruction_sets"] = sets;
    return info;
  });
}
