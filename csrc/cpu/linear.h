// What the CPU registrations of the linear ops share: from tensors to views, and how work is cut.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "check.h"
#include "cpu/number.h"

namespace prunelm {

inline Number number_of(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Number::f32;
    case ScalarType::Double:
      return Number::f64;
    case ScalarType::BFloat16:
      return Number::bf16;
    case ScalarType::Half:
      return Number::f16;
    default:
      refuse(name, "float32, float64, bfloat16 or float16",
             torch::headeronly::toString(tensor.scalar_type()));
  }
}

inline size_t compute_bytes(Number number) { return number == Number::f64 ? 8 : 4; }

// The kernels read weights of x's dtype, and any 16- or 32-bit weights with float32 rows.
inline void check_weight_dtype(const char* name, Number weight, const char* x_name, Number x,
                               const Tensor& found) {
  if (weight == x || (x == Number::f32 && weight != Number::f64)) return;
  refuse(name, std::string("the dtype of ") + x_name + ", or 16 bits beside float32",
         torch::headeronly::toString(found.scalar_type()));
}

inline MatrixView matrix_view(const char* name, const Tensor& x, int64_t columns) {
  const int64_t rows = columns ? x.numel() / columns : 0;
  return {x.data_ptr(), number_of(name, x), rows, columns, columns};
}

inline MatrixView rows_of(const MatrixView& x, int64_t first, int64_t count) {
  MatrixView part = x;
  part.data = static_cast<const char*>(x.data) + first * x.stride * bytes_of(x.number);
  part.rows = count;
  return part;
}

inline LinearResult rows_of(const LinearResult& y, int64_t first, int64_t count) {
  LinearResult part = y;
  part.data = static_cast<char*>(y.data) + first * y.columns * bytes_of(y.number);
  part.rows = count;
  return part;
}

// Shape of x [..., K] with N in K's place.
inline std::vector<int64_t> result_shape(const Tensor& x, int64_t N) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = N;
  return shape;
}

inline LinearResult linear_result(Tensor& y, int64_t rows, int64_t N,
                                  const std::optional<Tensor>& bias, int64_t activation) {
  LinearResult result{y.data_ptr(), number_of("x", y),     rows, N, nullptr,
                      Number::f32,  Activation(activation)};
  if (bias) {
    result.bias = bias->data_ptr();
    result.bias_number = number_of("bias", *bias);
  }
  return result;
}

// Rows of x that one pass packs: as many as the second-level cache holds, in whole tiles of 6
// and 16.
inline int64_t pass_rows(int64_t M, int64_t K, int64_t most) {
  const int64_t limit = K > 2048 ? most / 2 : most;
  const int64_t passes = std::max<int64_t>((M + limit - 1) / limit, 1);
  const int64_t even = (M + passes - 1) / passes;
  return std::min((even + 47) / 48 * 48, limit);
}

// Least units for a thread of its own: waking one takes about as long as 400,000 multiply-adds.
inline int64_t grain(double multiply_adds_per_unit) {
  return 1 + int64_t(400e3 / std::max(multiply_adds_per_unit, 1.0));
}

}  // namespace prunelm
