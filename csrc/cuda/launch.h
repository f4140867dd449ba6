// The CUDA launchers: raw pointers in, an error text or nullptr out. They return on empty work,
// never synchronise, and leave every check to the registrations in cuda/<op>.cpp. Contracts stand
// in prunelm/ops/<op>.py. Tensors are contiguous and on the current device.
#pragma once

#include <cstdint>

namespace prunelm::cuda {

enum class DType { float32, float64, float16, bfloat16 };
enum class Activation { none, relu, gelu, silu };

struct BlockSparseLinear {
  const void* x;        // [M, K]
  const void* values;   // [nnz, bk, bn]: bn fastest
  const int32_t* crow;  // [ceil(N / bn) + 1]
  const int32_t* col;   // [nnz]
  const void* bias;     // [N] or nullptr
  void* y;              // [M, N]
  int64_t M, K, N, bn, bk;
  const int32_t* cut;  // [ceil(N / bn), 9], BlockSparse's GPU index, or nullptr
  float* workspace;    // as many floats as block_sparse_linear_workspace says, or nullptr
};
// Floats that the launch needs to put down sums; 0 where clusters of thread blocks do without.
int64_t block_sparse_linear_workspace(const BlockSparseLinear& op, DType dtype);
const char* launch_block_sparse_linear(const BlockSparseLinear& op, DType dtype,
                                       Activation activation, void* stream);

// grad @ weight, and grad.T @ x at the stored blocks; float32.
struct BlockSparseGradient {
  const float* grad;    // [M, N]
  const float* x;       // [M, K], for values
  const float* values;  // [nnz, bk, bn], for x
  const int32_t* crow;  // [ceil(N / bn) + 1]
  const int32_t* col;   // [nnz], ascending in each row of blocks
  float* out;           // [M, K] or [nnz, bk, bn]
  int64_t M, K, N, bn, bk, nnz;
};
const char* launch_block_sparse_linear_grad_x(const BlockSparseGradient& op, void* stream);
const char* launch_block_sparse_linear_grad_values(const BlockSparseGradient& op, void* stream);

struct LowRankLinear {
  const void* x;     // [M, K]
  const void* down;  // [R, K]
  const void* up;    // [N, R]
  const void* bias;  // [N] or nullptr
  void* y;           // [M, N]
  float* workspace;  // as many floats as low_rank_linear_workspace says, or nullptr
  int64_t M, K, N, R;
};
// Floats for parts of the middle; 0 where clusters of thread blocks do without.
int64_t low_rank_linear_workspace(const LowRankLinear& op, DType dtype);
const char* launch_low_rank_linear(const LowRankLinear& op, DType dtype, Activation activation,
                                   void* stream);

constexpr int kMostHeadDim = 512;
struct TreeAttention {
  const void* qkv;  // [R, 3, H, D]
  const void* cos;  // [R, D / 2]
  const void* sin;
  const int64_t* path;    // [R, P]
  const int64_t* length;  // [R]
  void* key;              // [C, H, D]
  void* value;
  void* out;  // [R, H, D]
  int64_t R, P, H, D, C;
};
const char* launch_tree_attention(const TreeAttention& op, DType dtype, void* stream);

constexpr int kMaxTerms = 8;
constexpr int kMaxSilent = 8;
enum class Prune { late, early, after };

struct BeamTerm {
  const void* rows;    // [L, V] of dtype
  const int64_t* row;  // [B, W]
  const void* weight;  // [B], score's dtype
  int64_t L;
  DType dtype;
};
struct BeamStep {
  const void* score;         // [B, W]
  const void* am_logits;     // [B, W, V]
  const int64_t* slot;       // [B, W] or nullptr
  const void* token_reward;  // [B], score's dtype, or nullptr
  BeamTerm terms[kMaxTerms];
  int64_t silent[kMaxSilent];  // the first is the blank
  int32_t term_count, silent_count;
  double temperature, blank_penalty;
  Prune prune;
  bool weigh_blank;
  int64_t B, W, V;
  void* new_score;  // [B, W]
  int64_t* parent;  // [B, W]
  int64_t* token;   // [B, W]
  void* parts;      // [B, W, 1 + term_count]
  bool* bad;        // [B]
  void* workspace;  // of beam_step_workspace's bytes
  // Shared memory that a thread block may take; rows that do not fit are read from global memory.
  // Two blocks fit a multiprocessor of sm_80 and later, and one of 8.6 and 8.9.
  int64_t most_shared = 96 * 1024;
};
int64_t beam_step_workspace(const BeamStep& op, DType logits_dtype, DType score_dtype);
const char* launch_beam_step(const BeamStep& op, DType logits_dtype, DType score_dtype,
                             void* stream);

}  // namespace prunelm::cuda
