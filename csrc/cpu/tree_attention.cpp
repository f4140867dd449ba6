// Attention of new nodes of a token tree to their ancestors; contract in
// prunelm/ops/tree_attention.py.
#include "tree_attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "check.h"

namespace prunelm {
namespace {

template <typename T>
const TreeLoops<T>& loops() {
  if constexpr (std::is_same_v<T, float>) return PRUNELM_CHOSEN(tree_loops_float);
  if constexpr (!std::is_same_v<T, float>) return PRUNELM_CHOSEN(tree_loops_double);
}

template <typename T>
void run(const TreeAttentionShape& s, const Tensor& qkv, const Tensor& cos, const Tensor& sin,
         const Tensor& path, const Tensor& length, Tensor& key, Tensor& value, Tensor& out) {
  const auto* from = static_cast<const T*>(qkv.data_ptr());
  const auto* cosines = static_cast<const T*>(cos.data_ptr());
  const auto* sines = static_cast<const T*>(sin.data_ptr());
  const auto* paths = static_cast<const int64_t*>(path.data_ptr());
  const auto* lengths = static_cast<const int64_t*>(length.data_ptr());
  auto* keys = static_cast<T*>(key.data_ptr());
  auto* values = static_cast<T*>(value.data_ptr());
  auto* mixed = static_cast<T*>(out.data_ptr());
  const TreeShape<T> shape{s.H, s.D, T(1 / std::sqrt(double(s.D)))};
  const TreeLoops<T>& loop = loops<T>();
  const int64_t row = s.H * s.D;
  // All rows are stored before any is read: an ancestor may be a row of this call.
  for (int64_t r = 0; r < s.R; ++r) {
    const int64_t slot = paths[r * s.P + lengths[r] - 1];
    const int64_t angle = r * (s.D / 2);
    loop.rotate(from + (3 * r + 1) * row, cosines + angle, sines + angle, shape, keys + slot * row);
    std::memcpy(values + slot * row, from + (3 * r + 2) * row, row * sizeof(T));
  }
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, row * s.P));
  torch::stable::parallel_for(0, s.R, grain, [&](int64_t begin, int64_t end) {
    std::vector<T> query(row), scratch(s.H * s.P);
    for (int64_t r = begin; r < end; ++r) {
      const int64_t angle = r * (s.D / 2);
      loop.rotate(from + 3 * r * row, cosines + angle, sines + angle, shape, query.data());
      loop.attend(query.data(), keys, values, paths + r * s.P, lengths[r], shape, scratch.data(),
                  mixed + r * row);
    }
  });
}

Tensor tree_attention_cpu(const Tensor& qkv, const Tensor& cos, const Tensor& sin,
                          const Tensor& path, const Tensor& length, Tensor key, Tensor value) {
  const TreeAttentionShape s = check_tree_attention(qkv, cos, sin, path, length, key, value);
  check_floating("qkv", qkv);
  check_tree_paths(s, path, length, key);
  Tensor out = torch::stable::new_empty(qkv, {s.R, s.H, s.D});
  if (s.R == 0 || s.H == 0) return out;
  if (qkv.scalar_type() == ScalarType::Float) {
    run<float>(s, qkv, cos, sin, path, length, key, value, out);
  } else {
    run<double>(s, qkv, cos, sin, path, length, key, value, out);
  }
  return out;
}

}  // namespace
}  // namespace prunelm

STABLE_TORCH_LIBRARY_IMPL(prunelm, CPU, m) {
  m.impl("tree_attention", TORCH_BOX(&prunelm::tree_attention_cpu));
}
