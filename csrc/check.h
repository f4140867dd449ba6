// Argument checks shared by the ops' CPU and CUDA registrations. Every message says which argument,
// what was expected and what was found.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

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

struct RnntShape {
  int64_t B, T, U1, V;  // U1: one more than the longest target
};

inline RnntShape check_rnnt_loss(const Tensor& logits, const Tensor& targets,
                                 const Tensor& logit_lengths, const Tensor& target_lengths,
                                 int64_t blank) {
  check_dim("logits", logits, 4);
  const RnntShape shape{logits.size(0), logits.size(1), logits.size(2), logits.size(3)};
  check_contiguous("logits", logits);
  check_dim("targets", targets, 2);
  check_dtype("targets", targets, ScalarType::Long);
  check_contiguous("targets", targets);
  check_size("targets", targets, 0, shape.B);
  check_size("targets", targets, 1, shape.U1 - 1);
  for (const auto& [name, lengths, limit] :
       {std::tuple{"logit_lengths", &logit_lengths, shape.T},
        std::tuple{"target_lengths", &target_lengths, shape.U1 - 1}}) {
    check_dim(name, *lengths, 1);
    check_dtype(name, *lengths, ScalarType::Long);
    check_contiguous(name, *lengths);
    check_size(name, *lengths, 0, shape.B);
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

}  // namespace prunelm
