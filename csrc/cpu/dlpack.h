// The part of DLPack 1's C exchange interface that is used here (github.com/dmlc/dlpack), whose
// layout is fixed within a major version. torch hides its copy of the header from extensions on its
// stable ABI.
#pragma once

#include <cstdint>

namespace prunelm::dlpack {

constexpr uint32_t kMajorVersion = 1, kMinorVersion = 3;
constexpr int32_t kCPU = 1;
enum Code : uint8_t { kInt = 0, kFloat = 2, kBfloat = 4, kBool = 6 };

struct Tensor {
  void* data;
  int32_t device_type, device_index;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;  // in elements
  uint64_t byte_offset;
};

struct ManagedTensor {
  uint32_t major_version, minor_version;
  void* context;
  void (*deleter)(ManagedTensor* self);
  uint64_t flags;
  Tensor tensor;
};

struct ExchangeAPI {
  uint32_t major_version, minor_version;
  const void* previous;
  void (*allocate)();
  void (*managed_from_object)();
  // Takes the tensor over where it succeeds. 0, or -1 with a Python exception.
  int (*managed_to_object)(ManagedTensor* tensor, void** object);
  // Borrows: good while the tensor lives and is not changed. 0, or -1 with a Python exception.
  int (*tensor_from_object)(void* object, Tensor* tensor);
  void (*current_work_stream)();
};

}  // namespace prunelm::dlpack
