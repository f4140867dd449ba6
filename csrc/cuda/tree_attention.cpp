// Self-attention of new nodes of a token tree on CUDA; contract in prunelm/ops/tree_attention.py.
#include <torch/csrc/stable/library.h>

#include <string>
#include <utility>

#include "cuda/binding.h"

namespace prunelm::cuda {
namespace {

Tensor tree_attention_cuda(const Tensor& qkv, const Tensor& cos, const Tensor& sin,
                           const Tensor& path, const Tensor& length, Tensor key, Tensor value) {
  const TreeAttentionShape s = check_tree_attention(qkv, cos, sin, path, length, key, value);
  if (s.D > kMostHeadDim) {
    refuse("qkv", "a head_dim of at most " + std::to_string(kMostHeadDim), std::to_string(s.D));
  }
  for (const auto& [name, tensor] :
       {std::pair{"cos", &cos}, std::pair{"sin", &sin}, std::pair{"path", &path},
        std::pair{"length", &length}, std::pair<const char*, const Tensor*>{"key", &key},
        std::pair<const char*, const Tensor*>{"value", &value}}) {
    check_device(name, *tensor, qkv);
  }
  const OnDeviceOf device(qkv);
  Tensor out = torch::stable::new_empty(qkv, {s.R, s.H, s.D});
  const TreeAttention op{qkv.data_ptr(),
                         cos.data_ptr(),
                         sin.data_ptr(),
                         static_cast<const int64_t*>(path.data_ptr()),
                         static_cast<const int64_t*>(length.data_ptr()),
                         key.data_ptr(),
                         value.data_ptr(),
                         out.data_ptr(),
                         s.R,
                         s.P,
                         s.H,
                         s.D,
                         key.size(0)};
  check_launched("tree_attention", launch_tree_attention(op, dtype_of("qkv", qkv), device.stream));
  return out;
}

}  // namespace
}  // namespace prunelm::cuda

STABLE_TORCH_LIBRARY_IMPL(prunelm, CUDA, m) {
  m.impl("tree_attention", TORCH_BOX(&prunelm::cuda::tree_attention_cuda));
}
