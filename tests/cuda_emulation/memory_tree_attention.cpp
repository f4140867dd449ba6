#include "memory.h"

namespace {

// Each row descends from the one behind it, whose key no block has stored yet; the last one's path
// has P - R nodes of the pool. Slots are the nodes in order.
template <typename T>
void tree_attention(const char* name, int64_t R, int64_t P, int64_t H, int64_t D) {
  const DType dtype = sizeof(T) == 4 ? DType::float32 : DType::bfloat16;
  const auto qkv = as<T>(random(R * 3 * H * D));
  const auto cos = as<T>(random(R * (D / 2))), sin = as<T>(random(R * (D / 2)));
  std::vector<int64_t> path(R * P, int64_t{1} << 40), length(R);
  for (int64_t r = 0; r < R; ++r) {
    length[r] = P - r;
    for (int64_t p = 0; p < length[r]; ++p) path[r * P + p] = p;
  }
  auto pool = random(P * H * D);
  for (int64_t i = (P - R) * H * D; i < P * H * D; ++i) pool[i] = NAN;
  auto key = as<T>(pool), value = as<T>(pool);
  auto out = as<T>(std::vector<float>(R * H * D, NAN));
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
