// Argument checks shared by the ops' CPU and CUDA registrations. Every message says which argument,
// what was expected and what was found.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "storage.h"

namespace prunelm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

[[noreturn]] inline void refuse(const char* name, const std::string& expected,
                                const std::string& found) {
  throw std::runtime_error(std::string(name) + ": expected " + expected + ", got " + found);
}

inline std::string shape_text(const Tensor& tensor) {
  std::ostringstream out;
  out << '[';
  for (int64_t i = 0; i < tensor.dim(); ++i) out << (i ? ", " : "") << tensor.size(i);
  out << ']';
  return out.str();
}

inline void check_dim(const char* name, const Tensor& tensor, int64_t dim) {
  if (tensor.dim() != dim) refuse(name, std::to_string(dim) + " dimensions", shape_text(tensor));
}

inline void check_size(const char* name, const Tensor& tensor, int64_t axis, int64_t size) {
  if (tensor.size(axis) != size) {
    refuse(name, "size " + std::to_string(size) + " in dimension " + std::to_string(axis),
           shape_text(tensor));
  }
}

inline void check_dtype(const char* name, const Tensor& tensor, ScalarType dtype) {
  if (tensor.scalar_type() != dtype) {
    refuse(name, torch::headeronly::toString(dtype),
           torch::headeronly::toString(tensor.scalar_type()));
  }
}

inline void check_contiguous(const char* name, const Tensor& tensor) {
  if (!tensor.is_contiguous()) refuse(name, "a contiguous tensor", "strides that are not");
}

// Asked before anything reads the tensor, a copy of it included.
inline void check_memory(const char* name, const Tensor& tensor) {
  int64_t found = 0, offset = 0;
  const bool known = storage_of(tensor.get(), &found, &offset);
  const int64_t needed = bytes_needed(tensor.dim(), tensor.sizes().data(), tensor.strides().data(),
                                      offset, int64_t(tensor.element_size()));
  if (needed > 0 && (!known || needed > found)) {
    refuse(name, "a storage of at least " + std::to_string(needed) + " bytes",
           std::to_string(found));
  }
}

struct RnntShape {
  int64_t B, T, U1, V;  // U1: one more than the longest target
};

inline RnntShape check_rnnt_loss(const Tensor& logits, const Tensor& targets,
                                 const Tensor& logit_lengths, const Tensor& target_lengths,
                                 int64_t blank) {
  check_dim("logits", logits, 4);
  const RnntShape shape{logits.size(0), logits.size(1), logits.size(2), logits.size(3)};
  check_contiguous("logits", logits);
  check_memory("logits", logits);
  check_dim("targets", targets, 2);
  check_dtype("targets", targets, ScalarType::Long);
  check_contiguous("targets", targets);
  check_size("targets", targets, 0, shape.B);
  if (shape.U1 < 1 || shape.V < 1)
    refuse("logits", "U + 1 and V of at least 1", shape_text(logits));
  check_size("targets", targets, 1, shape.U1 - 1);
  check_memory("targets", targets);
  for (const auto& [name, lengths, limit] :
       {std::tuple{"logit_lengths", &logit_lengths, shape.T},
        std::tuple{"target_lengths", &target_lengths, shape.U1 - 1}}) {
    check_dim(name, *lengths, 1);
    check_dtype(name, *lengths, ScalarType::Long);
    check_contiguous(name, *lengths);
    check_size(name, *lengths, 0, shape.B);
    check_memory(name, *lengths);
    const int64_t least = lengths == &logit_lengths ? 1 : 0;
    const auto* values = static_cast<const int64_t*>(lengths->data_ptr());
    for (int64_t b = 0; b < shape.B; ++b) {
      if (values[b] < least || values[b] > limit) {
        refuse(name, std::to_string(least) + " to " + std::to_string(limit),
               std::to_string(values[b]) + " at " + std::to_string(b));
      }
    }
  }
  if (blank < 0 || blank >= shape.V) {
    refuse("blank", "0 to " + std::to_string(shape.V - 1), std::to_string(blank));
  }
  const auto* tokens = static_cast<const int64_t*>(targets.data_ptr());
  const auto* lengths = static_cast<const int64_t*>(target_lengths.data_ptr());
  for (int64_t b = 0; b < shape.B; ++b) {
    for (int64_t u = 0; u < lengths[b]; ++u) {
      const int64_t token = tokens[b * (shape.U1 - 1) + u];
      if (token < 0 || token >= shape.V || token == blank) {
        refuse("targets", "tokens of the vocabulary without blank", std::to_string(token));
      }
    }
  }
  return shape;
}

enum class Prune { late, early, after };

inline const char* prune_name(Prune prune) {
  return prune == Prune::late ? "late" : prune == Prune::early ? "early" : "after";
}

inline Prune prune_of(const std::string& name) {
  for (const Prune prune : {Prune::late, Prune::early, Prune::after}) {
    if (name == prune_name(prune)) return prune;
  }
  refuse("prune", "late, early or after", name);
}

enum Slot : int64_t { kExpand = 0, kBlankOnly = 1, kKeep = 2, kDead = 3 };

struct BeamShape {
  int64_t B, W, V;
};

inline void check_floating(const char* name, const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::Double) {
    refuse(name, "float32 or float64", torch::headeronly::toString(dtype));
  }
}

inline void check_indices(const char* name, const Tensor& tensor, int64_t B, int64_t W) {
  check_dim(name, tensor, 2);
  check_size(name, tensor, 0, B);
  check_size(name, tensor, 1, W);
  check_dtype(name, tensor, ScalarType::Long);
  check_contiguous(name, tensor);
  check_memory(name, tensor);
}

inline void check_per_utterance(const char* name, const Tensor& tensor, const Tensor& score) {
  check_dim(name, tensor, 1);
  check_size(name, tensor, 0, score.size(0));
  check_dtype(name, tensor, score.scalar_type());
  check_contiguous(name, tensor);
  check_memory(name, tensor);
}

inline BeamShape check_beam_step(const Tensor& score, const Tensor& am_logits,
                                 const std::vector<Tensor>& rows, const std::vector<Tensor>& row,
                                 const std::vector<Tensor>& weight,
                                 const std::optional<Tensor>& slot,
                                 const std::vector<int64_t>& silent,
                                 const std::optional<Tensor>& token_reward, double temperature) {
  check_dim("am_logits", am_logits, 3);
  check_floating("am_logits", am_logits);
  check_contiguous("am_logits", am_logits);
  check_memory("am_logits", am_logits);
  const BeamShape shape{am_logits.size(0), am_logits.size(1), am_logits.size(2)};
  if (shape.W < 1 || shape.V < 1)
    refuse("am_logits", "W and V of at least 1", shape_text(am_logits));
  check_dim("score", score, 2);
  check_size("score", score, 0, shape.B);
  check_size("score", score, 1, shape.W);
  check_floating("score", score);
  check_contiguous("score", score);
  check_memory("score", score);
  if (rows.size() != row.size() || rows.size() != weight.size()) {
    refuse("terms", "as many row and weight as rows",
           std::to_string(rows.size()) + ", " + std::to_string(row.size()) + " and " +
               std::to_string(weight.size()));
  }
  for (size_t i = 0; i < rows.size(); ++i) {
    check_dim("rows", rows[i], 2);
    check_size("rows", rows[i], 1, shape.V);
    check_contiguous("rows", rows[i]);
    check_memory("rows", rows[i]);
    const ScalarType dtype = rows[i].scalar_type();
    if (dtype != ScalarType::Half && dtype != ScalarType::BFloat16) check_floating("rows", rows[i]);
    check_indices("row", row[i], shape.B, shape.W);
    check_per_utterance("weight", weight[i], score);
  }
  if (slot) check_indices("slot", *slot, shape.B, shape.W);
  if (token_reward) check_per_utterance("token_reward", *token_reward, score);
  if (silent.empty()) refuse("silent", "at least the blank token", "none");
  for (const int64_t token : silent) {
    if (token < 0 || token >= shape.V) {
      refuse("silent", "tokens from 0 to " + std::to_string(shape.V - 1), std::to_string(token));
    }
  }
  if (!(temperature > 0)) refuse("temperature", "a number above 0", std::to_string(temperature));
  return shape;
}

struct TreeAttentionShape {
  int64_t R, P, H, D;
};

inline TreeAttentionShape check_tree_attention(const Tensor& qkv, const Tensor& cos,
                                               const Tensor& sin, const Tensor& path,
                                               const Tensor& length, const Tensor& key,
                                               const Tensor& value) {
  check_dim("qkv", qkv, 4);
  check_size("qkv", qkv, 1, 3);
  check_dim("path", path, 2);
  const TreeAttentionShape shape{qkv.size(0), path.size(1), qkv.size(2), qkv.size(3)};
  if (shape.D < 2 || shape.D % 2) refuse("qkv", "an even head_dim", std::to_string(shape.D));
  for (const auto& [name, angles] : {std::pair{"cos", &cos}, std::pair{"sin", &sin}}) {
    check_dim(name, *angles, 2);
    check_size(name, *angles, 0, shape.R);
    check_size(name, *angles, 1, shape.D / 2);
  }
  for (const auto& [name, cache] : {std::pair{"key", &key}, std::pair{"value", &value}}) {
    check_dim(name, *cache, 3);
    check_size(name, *cache, 0, key.size(0));
    check_size(name, *cache, 1, shape.H);
    check_size(name, *cache, 2, shape.D);
  }
  for (const auto& [name, tensor] : {std::pair{"cos", &cos}, std::pair{"sin", &sin},
                                     std::pair{"key", &key}, std::pair{"value", &value}}) {
    check_dtype(name, *tensor, qkv.scalar_type());
    check_contiguous(name, *tensor);
    check_memory(name, *tensor);
  }
  check_contiguous("qkv", qkv);
  check_memory("qkv", qkv);
  check_indices("path", path, shape.R, shape.P);
  check_dim("length", length, 1);
  check_size("length", length, 0, shape.R);
  check_dtype("length", length, ScalarType::Long);
  check_contiguous("length", length);
  check_memory("length", length);
  return shape;
}

// What path and length hold, on the CPU.
inline void check_tree_paths(const TreeAttentionShape& shape, const Tensor& path,
                             const Tensor& length, const Tensor& key) {
  const auto* lengths = static_cast<const int64_t*>(length.data_ptr());
  const auto* slots = static_cast<const int64_t*>(path.data_ptr());
  for (int64_t r = 0; r < shape.R; ++r) {
    if (lengths[r] < 1 || lengths[r] > shape.P) {
      refuse("length", "1 to " + std::to_string(shape.P), std::to_string(lengths[r]));
    }
    for (int64_t p = 0; p < lengths[r]; ++p) {
      const int64_t slot = slots[r * shape.P + p];
      if (slot < 0 || slot >= key.size(0)) {
        refuse("path", "0 to " + std::to_string(key.size(0) - 1), std::to_string(slot));
      }
    }
  }
}

struct BlockSparseShape {
  int64_t N, K, bn, bk;
};

inline void check_dtype_of(const char* name, const Tensor& tensor, const char* other_name,
                           const Tensor& other) {
  if (tensor.scalar_type() != other.scalar_type()) {
    refuse(name, std::string(other_name) + "'s " + torch::headeronly::toString(other.scalar_type()),
           torch::headeronly::toString(tensor.scalar_type()));
  }
}

// crow and col as far as their shapes tell; what they hold is checked where it is read.
inline void check_blocks(const Tensor& crow, const Tensor& col, const BlockSparseShape& s) {
  if (s.bn < 1 || s.bk < 1) {
    refuse("values", "blocks of at least 1 x 1",
           std::to_string(s.bn) + " x " + std::to_string(s.bk));
  }
  constexpr int64_t limit = 2147483647;  // indices are int32
  if (s.bn > limit || s.bk > limit || s.bn * s.bk > limit) {
    refuse("values", "blocks of at most 2147483647 numbers",
           std::to_string(s.bn) + " x " + std::to_string(s.bk));
  }
  constexpr int64_t most = int64_t{1} << 62;  // far from where sums of sizes overflow
  if (s.N > most || s.K > most) {
    refuse("weight", "sizes of at most 2^62", std::to_string(s.N) + " x " + std::to_string(s.K));
  }
  const int64_t rows = (s.N + s.bn - 1) / s.bn, columns = (s.K + s.bk - 1) / s.bk;
  if (rows > limit) refuse("weight", "at most 2147483647 rows of blocks", std::to_string(rows));
  if (columns > limit) {
    refuse("weight", "at most 2147483647 columns of blocks", std::to_string(columns));
  }
  for (const auto& [name, index] : {std::pair{"crow", &crow}, std::pair{"col", &col}}) {
    check_dim(name, *index, 1);
    check_dtype(name, *index, ScalarType::Int);
    check_contiguous(name, *index);
    check_memory(name, *index);
  }
  if (col.size(0) > limit) refuse("col", "at most 2147483647 blocks", shape_text(col));
  check_size("crow", crow, 0, rows + 1);
}

inline void check_bias(const std::optional<Tensor>& bias, const Tensor& x, const Tensor& weight,
                       int64_t N) {
  if (!bias) return;
  check_dim("bias", *bias, 1);
  check_size("bias", *bias, 0, N);
  check_contiguous("bias", *bias);
  check_memory("bias", *bias);
  if (bias->scalar_type() != weight.scalar_type()) check_dtype_of("bias", *bias, "x", x);
}

inline BlockSparseShape check_block_sparse_linear(const Tensor& x, const Tensor& values,
                                                  const Tensor& crow, const Tensor& col,
                                                  const std::optional<Tensor>& bias, int64_t N,
                                                  int64_t activation) {
  if (x.dim() < 1) refuse("x", "[..., K]", shape_text(x));
  check_dim("values", values, 3);
  if (N < 0) refuse("out_features", "at least 0", std::to_string(N));
  const BlockSparseShape s{N, x.size(x.dim() - 1), values.size(1), values.size(2)};
  check_blocks(crow, col, s);
  check_size("col", col, 0, values.size(0));
  check_memory("x", x);
  check_memory("values", values);
  check_bias(bias, x, values, N);
  if (activation < 0 || activation > 3) refuse("activation", "0 to 3", std::to_string(activation));
  return s;
}

inline BlockSparseShape check_block_sparse_grad(const Tensor& grad, const Tensor& values,
                                                const Tensor& crow, const Tensor& col, int64_t K) {
  if (grad.dim() < 1) refuse("grad", "[..., N]", shape_text(grad));
  check_dim("values", values, 3);
  if (K < 0) refuse("in_features", "at least 0", std::to_string(K));
  const BlockSparseShape s{grad.size(grad.dim() - 1), K, values.size(1), values.size(2)};
  check_blocks(crow, col, s);
  check_size("col", col, 0, values.size(0));
  check_memory("grad", grad);
  check_memory("values", values);
  return s;
}

inline BlockSparseShape check_block_sparse_grad_values(const Tensor& grad, const Tensor& x,
                                                       const Tensor& crow, const Tensor& col,
                                                       int64_t bn, int64_t bk) {
  if (grad.dim() < 1) refuse("grad", "[..., N]", shape_text(grad));
  if (x.dim() != grad.dim()) refuse("x", "as many dimensions as grad", shape_text(x));
  for (int64_t i = 0; i + 1 < x.dim(); ++i) check_size("x", x, i, grad.size(i));
  const BlockSparseShape s{grad.size(grad.dim() - 1), x.size(x.dim() - 1), bn, bk};
  check_blocks(crow, col, s);
  check_memory("grad", grad);
  check_memory("x", x);
  return s;
}

// The second factor of low_rank_linear_blocks.
inline BlockSparseShape check_low_rank_up(const Tensor& x, const Tensor& values, const Tensor& crow,
                                          const Tensor& col, const std::optional<Tensor>& bias,
                                          int64_t N, int64_t R, int64_t activation) {
  check_dim("up_values", values, 3);
  const BlockSparseShape s{N, R, values.size(1), values.size(2)};
  check_blocks(crow, col, s);
  check_size("up_col", col, 0, values.size(0));
  check_memory("up_values", values);
  check_bias(bias, x, values, N);
  if (activation < 0 || activation > 3) refuse("activation", "0 to 3", std::to_string(activation));
  return s;
}

struct LowRankShape {
  int64_t N, K, R;
};

inline LowRankShape check_low_rank_linear(const Tensor& x, const Tensor& down, const Tensor& up,
                                          const std::optional<Tensor>& bias, int64_t activation) {
  if (x.dim() < 1) refuse("x", "[..., K]", shape_text(x));
  check_dim("down", down, 2);
  check_dim("up", up, 2);
  const LowRankShape s{up.size(0), x.size(x.dim() - 1), down.size(0)};
  check_size("down", down, 1, s.K);
  check_size("up", up, 1, s.R);
  check_dtype_of("up", up, "down", down);
  check_memory("x", x);
  check_memory("down", down);
  check_memory("up", up);
  check_bias(bias, x, up, s.N);
  if (activation < 0 || activation > 3) refuse("activation", "0 to 3", std::to_string(activation));
  return s;
}

}  // namespace prunelm
