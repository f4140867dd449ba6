#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "memory.h"

namespace {

std::vector<float> narrow(const std::vector<float>& wide, float) { return wide; }
std::vector<__nv_bfloat16> narrow(const std::vector<float>& wide, __nv_bfloat16) {
  std::vector<__nv_bfloat16> out;
  out.reserve(wide.size());  // its exact size, as all tensors here
  for (const float x : wide) out.push_back(__float2bfloat16_rn(x));
  return out;
}

float widen(float x) { return x; }
float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

// Each row descends from the one behind it, whose key no block has stored yet; the last one's path
// has P - R nodes of the pool. Slots are the nodes in order.
template <typename T>
void tree_attention(const char* name, int64_t R, int64_t P, int64_t H, int64_t D) {
  const DType dtype = sizeof(T) == 4 ? DType::float32 : DType::bfloat16;
  const auto qkv = narrow(random(R * 3 * H * D), T{});
  const auto cos = narrow(random(R * (D / 2)), T{}), sin = narrow(random(R * (D / 2)), T{});
  std::vector<int64_t> path(R * P, int64_t{1} << 40), length(R);
  for (int64_t r = 0; r < R; ++r) {
    length[r] = P - r;
    for (int64_t p = 0; p < length[r]; ++p) path[r * P + p] = p;
  }
  auto pool = random(P * H * D);
  for (int64_t i = (P - R) * H * D; i < P * H * D; ++i) pool[i] = NAN;
  auto key = narrow(pool, T{}), value = narrow(pool, T{});
  auto out = narrow(std::vector<float>(R * H * D, NAN), T{});
  const TreeAttention op{qkv.data(),
                         cos.data(),
                         sin.data(),
                         path.data(),
                         length.data(),
                         key.data(),
                         value.data(),
                         out.data(),
                         R,
                         P,
                         H,
                         D,
                         P};
  const char* error = launched(launch_tree_attention, op, dtype, nullptr);
  for (const auto* tensor : {&out, &key, &value}) {
    std::vector<float> wide;
    for (const T one : *tensor) wide.push_back(widen(one));
    report(name, error, wide);
  }
}

}  // namespace

int main() {
  tree_attention<float>("one launch", 3, 40, 2, 20);
  tree_attention<__nv_bfloat16>("teams of a warp", 2, 21, 1, 136);
  tree_attention<float>("single numbers", 2, 7, 1, 6);
  tree_attention<__nv_bfloat16>("two launches", 129, 131, 1, 8);
  return ok ? 0 : 1;
}
