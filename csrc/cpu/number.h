// What the linear kernels read and write: floating dtypes, matrices, results.
#pragma once

#include <cstdint>

namespace prunelm {

enum class Number { f32, f64, bf16, f16 };

constexpr int64_t bytes_of(Number number) {
  return number == Number::f64 ? 8 : number == Number::f32 ? 4 : 2;
}

// What a linear op does to its result; the codes of prunelm/ops/activation.py.
enum class Activation : int64_t { none, relu, gelu, silu };

struct MatrixView {
  const void* data;  // [rows][stride], of which `columns` count
  Number number;
  int64_t rows, columns, stride;
};

// activation(sums + bias), dense.
struct LinearResult {
  void* data;  // [rows][columns]
  Number number;
  int64_t rows, columns;
  const void* bias;  // [columns] or null
  Number bias_number;
  Activation activation;
};

}  // namespace prunelm
