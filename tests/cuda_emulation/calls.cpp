// The launchers under C names, for ctypes; built with the emulation.
#include "cuda/launch.h"
#include "cuda_runtime.h"

using namespace prunelm::cuda;

extern "C" {
void play(int compute_capability, int multiprocessors, int largest_cluster) {
  cuda_emulation::compute_capability = compute_capability;
  cuda_emulation::multiprocessors = multiprocessors;
  cuda_emulation::largest_cluster = largest_cluster;
  cuda_emulation::most_shared = (compute_capability < 90 ? 163 : 227) * 1024;
}

// A line for each kernel that was launched and each compute capability: the kernel's name, the
// capability, the most threads, the most dynamic shared memory, the widest cluster.
const char* launches() {
  static std::string lines;
  lines.clear();
  for (const auto& [of, most] : cuda_emulation::launches) {
    for (const auto& symbol : cuda_emulation::symbols()) {
      if (!symbol.function || symbol.address != of.first) continue;
      lines += symbol.name;
      for (const size_t number :
           {size_t(of.second), size_t(most.threads), most.shared, size_t(most.cluster)}) {
        lines += " " + std::to_string(number);
      }
      lines += "\n";
      break;
    }
  }
  return lines.c_str();
}

int64_t block_sparse_linear_workspace(const BlockSparseLinear* op, int dtype) {
  return block_sparse_linear_workspace(*op, DType(dtype));
}

int64_t size_of_block_sparse_linear() { return sizeof(BlockSparseLinear); }
int64_t size_of_block_sparse_linear_grad_x() { return sizeof(BlockSparseGradient); }
int64_t size_of_block_sparse_linear_grad_values() { return sizeof(BlockSparseGradient); }
int64_t size_of_low_rank_linear() { return sizeof(LowRankLinear); }
int64_t size_of_tree_attention() { return sizeof(TreeAttention); }
int64_t size_of_beam_step() { return sizeof(BeamStep); }

const char* block_sparse_linear(const BlockSparseLinear* op, int dtype, int activation) {
  return launch_block_sparse_linear(*op, DType(dtype), Activation(activation), nullptr);
}
const char* block_sparse_linear_grad_x(const BlockSparseGradient* op) {
  return launch_block_sparse_linear_grad_x(*op, nullptr);
}
const char* block_sparse_linear_grad_values(const BlockSparseGradient* op) {
  return launch_block_sparse_linear_grad_values(*op, nullptr);
}
int64_t low_rank_linear_workspace(const LowRankLinear* op, int dtype) {
  return low_rank_linear_workspace(*op, DType(dtype));
}
const char* low_rank_linear(const LowRankLinear* op, int dtype, int activation) {
  return launch_low_rank_linear(*op, DType(dtype), Activation(activation), nullptr);
}
const char* tree_attention(const TreeAttention* op, int dtype) {
  return launch_tree_attention(*op, DType(dtype), nullptr);
}
int64_t beam_step_workspace_bytes(const BeamStep* op, int logits_dtype, int score_dtype) {
  return beam_step_workspace(*op, DType(logits_dtype), DType(score_dtype));
}
const char* beam_step(const BeamStep* op, int logits_dtype, int score_dtype) {
  return launch_beam_step(*op, DType(logits_dtype), DType(score_dtype), nullptr);
}
}
