// tree_attention's loops; compiled once per instruction set, in the compiler's vectors.
#include "tree_attention.h"
#include "vectors.h"

namespace prunelm::PRUNELM_ISA {
namespace {

template <typename T>
void rotate(const T* x, const T* cos, const T* sin, const TreeShape<T>& shape, T* out) {
  const int64_t half = shape.head_dim / 2;
  for (int64_t h = 0; h < shape.heads; ++h, x += shape.head_dim, out += shape.head_dim) {
    for (int64_t i = 0; i < half; ++i) {
      const T first = x[i], second = x[i + half];
      out[i] = first * cos[i] - second * sin[i];
      out[i + half] = second * cos[i] + first * sin[i];
    }
  }
}

template <typename T>
T dot(const T* a, const T* b, int64_t size) {
  Vec<T> sum{}, second{};
  int64_t i = 0;
  for (; i + 2 * kLanes<T> <= size; i += 2 * kLanes<T>) {
    sum += load(a + i) * load(b + i);
    second += load(a + i + kLanes<T>) * load(b + i + kLanes<T>);
  }
  sum += second;
  T total = 0;
  for (int64_t lane = 0; lane < kLanes<T>; ++lane) total += sum[lane];
  for (; i < size; ++i) total += a[i] * b[i];
  return total;
}

template <typename T>
void softmax(T* x, int64_t size) {
  T high = x[0];  // or NaN where one is, which makes all of them NaN
  for (int64_t i = 1; i < size; ++i) high = x[i] > high || x[i] != x[i] ? x[i] : high;
  T sum = 0;
  for (int64_t i = 0; i < size; i += kLanes<T>) {
    const int64_t count = size - i < kLanes<T> ? size - i : kLanes<T>;
    const Vec<T> e = exp_nonpositive(load_tail(x + i, count) - high);
    std::memcpy(x + i, &e, count * sizeof(T));
    for (int64_t lane = 0; lane < count; ++lane) sum += e[lane];
  }
  for (int64_t i = 0; i < size; ++i) x[i] /= sum;
}

template <typename T>
void attend(const T* query, const T* key, const T* value, const int64_t* path, int64_t length,
            const TreeShape<T>& shape, T* scratch, T* out) {
  const auto [heads, head_dim, scale] = shape;
  const int64_t row = heads * head_dim;
  for (int64_t p = 0; p < length; ++p) {
    const T* keys = key + path[p] * row;
    for (int64_t h = 0; h < heads; ++h) {
      scratch[h * length + p] = scale * dot(query + h * head_dim, keys + h * head_dim, head_dim);
    }
  }
  for (int64_t h = 0; h < heads; ++h) softmax(scratch + h * length, length);
  for (int64_t i = 0; i < row; ++i) out[i] = 0;
  for (int64_t p = 0; p < length; ++p) {
    const T* values = value + path[p] * row;
    for (int64_t h = 0; h < heads; ++h) {
      const T weight = scratch[h * length + p];
      T* __restrict mixed = out + h * head_dim;
      for (int64_t i = 0; i < head_dim; ++i) mixed[i] += weight * values[h * head_dim + i];
    }
  }
}

}  // namespace

const TreeLoops<float> tree_loops_float{rotate<float>, attend<float>};
const TreeLoops<double> tree_loops_double{rotate<double>, attend<double>};

}  // namespace prunelm::PRUNELM_ISA
