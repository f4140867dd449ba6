#include "cpu/direct.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <functional>
#include <new>
#include <numeric>
#include <utility>

#include "storage.h"

namespace py = pybind11;

namespace prunelm {
namespace {

// Where a tensor's Python object holds the tensor itself: as far from its begin as there where the
// address that torch gives for a tensor stands in that tensor's own object. Throws where it is not
// found.
size_t find_handle(const py::module_& torch) {
  const py::object tensor = torch.attr("empty")(7)[py::slice(3, 7, 1)];
  const py::capsule given =
      torch.attr("_C").attr("_aoti").attr("unsafe_alloc_void_ptr_from_tensor")(tensor);
  auto* const copy = static_cast<AtenTensorHandle>(given.get_pointer());
  void* held = nullptr;
  std::memcpy(&held, static_cast<const void*>(copy), sizeof(held));
  aoti_torch_delete_tensor_object(copy);
  char* const object = reinterpret_cast<char*>(tensor.ptr());
  const auto size = size_t(Py_TYPE(tensor.ptr())->tp_basicsize);
  for (size_t at = sizeof(PyObject); at + sizeof(held) <= size; at += sizeof(held)) {
    void* here = nullptr;
    std::memcpy(&here, object + at, sizeof(here));
    int64_t bytes = 0, offset = 0;
    if (here == held &&
        storage_of(reinterpret_cast<AtenTensorHandle>(object + at), &bytes, &offset) &&
        bytes == 7 * 4 && offset == 3) {
      return at;
    }
  }
  throw py::import_error("a tensor's handle");
}

// What is asked of torch at each call, looked up once.
struct Torch {
  PyTypeObject *tensor, *parameter;
  std::array<PyObject*, 7> watchers;    // functions without arguments, all of which must say no
  PyObject *forward_gradients, *level;  // a module's dictionary and the name of a number in it
  PyObject* is_neg;
  size_t handle;  // find_handle
  const dlpack::ExchangeAPI* exchange;

  // Throws where this torch has not all of it.
  Torch() {
    const auto kept = [](const py::handle& from, auto... names) {
      py::object found = py::reinterpret_borrow<py::object>(from);
      ((found = found.attr(names)), ...);
      return found.release().ptr();
    };
    const py::module_ t = py::module_::import("torch"), c = t.attr("_C");
    tensor = reinterpret_cast<PyTypeObject*>(kept(t, "Tensor"));
    parameter = reinterpret_cast<PyTypeObject*>(kept(t, "nn", "Parameter"));
    watchers = {kept(c, "is_grad_enabled"),
                kept(c, "_are_functorch_transforms_active"),
                kept(c, "_is_any_autocast_enabled"),
                kept(c, "_len_torch_dispatch_stack"),
                kept(c, "_len_torch_function_stack"),
                kept(c, "_is_tracing"),
                kept(c, "_autograd", "_profiler_enabled")};
    forward_gradients = kept(t, "autograd", "forward_ad", "__dict__");
    level = PyUnicode_InternFromString("_current_level");
    is_neg = kept(t, "Tensor", "is_neg");
    handle = find_handle(t);
    const py::capsule capsule = t.attr("Tensor").attr("__dlpack_c_exchange_api__");
    exchange = capsule.get_pointer<dlpack::ExchangeAPI>();
    if (exchange->major_version != dlpack::kMajorVersion) throw py::import_error("DLPack");
  }
};

const Torch* torch = nullptr;  // where all was found

// False also where there is no answer.
bool says_no(PyObject* answer) {
  if (!answer) return PyErr_Clear(), false;
  const bool no = answer == Py_False || (answer != Py_True && PyObject_IsTrue(answer) == 0);
  Py_DECREF(answer);
  return no;
}

// On any device. What is read is good as long as its memory is.
bool borrow(PyObject* given, dlpack::Tensor& tensor) {
  // A subclass may hold anything.
  if (Py_TYPE(given) != torch->tensor && Py_TYPE(given) != torch->parameter) return false;
  if (torch->exchange->tensor_from_object(given, &tensor) != 0) return PyErr_Clear(), false;
  const auto handle =
      reinterpret_cast<AtenTensorHandle>(reinterpret_cast<char*>(given) + torch->handle);
  int64_t found = 0, offset = 0;
  return storage_of(handle, &found, &offset) &&
         bytes_needed(tensor.ndim, tensor.shape, tensor.strides, offset, tensor.bits / 8) <= found;
}

bool read(PyObject* given, dlpack::Tensor& tensor) {
  if (!borrow(given, tensor) || tensor.device_type != dlpack::kCPU) return false;
  // A tensor of zeros may have no memory.
  if (!tensor.data) return std::count(tensor.shape, tensor.shape + tensor.ndim, 0) > 0;
  tensor.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  return true;
}

PyObject* readable(PyObject*, PyObject* const* given, Py_ssize_t count) {
  dlpack::Tensor first{}, tensor{};
  bool found = false;
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (given[i] == Py_None) continue;
    if (!torch || !borrow(given[i], tensor)) Py_RETURN_FALSE;
    if (!std::exchange(found, true)) first = tensor;
    if (tensor.device_type != first.device_type || tensor.device_index != first.device_index) {
      Py_RETURN_FALSE;
    }
  }
  Py_RETURN_TRUE;
}

bool number_of(const dlpack::Tensor& tensor, Number& number) {
  if (tensor.code == dlpack::kBfloat) return number = Number::bf16, true;
  number = tensor.bits == 64 ? Number::f64 : tensor.bits == 32 ? Number::f32 : Number::f16;
  return tensor.code == dlpack::kFloat;
}

int64_t numel_of(const dlpack::Tensor& tensor) {
  return std::accumulate(tensor.shape, tensor.shape + tensor.ndim, int64_t{1}, std::multiplies());
}

bool is_contiguous(const dlpack::Tensor& tensor) {
  int64_t numel = 1;
  for (int32_t i = tensor.ndim - 1; i >= 0; --i) {
    if (tensor.shape[i] != 1 && tensor.strides[i] != numel) return false;
    numel *= tensor.shape[i];
  }
  return true;
}

// One after the other in memory; the stride of a single one is free.
bool is_list(const dlpack::Tensor& tensor, int64_t size) {
  return tensor.ndim == 1 && tensor.shape[0] == size && (size <= 1 || tensor.strides[0] == 1);
}

bool is_index(const dlpack::Tensor& tensor, int64_t size) {
  return tensor.code == dlpack::kInt && tensor.bits == 32 && is_list(tensor, size);
}

bool size_of(PyObject* given, int64_t& size) {
  if (!PyLong_CheckExact(given)) return false;  // others may run Python to answer
  size = PyLong_AsLongLong(given);              // -1 if it does not fit
  return 0 <= size && size <= INT32_MAX;
}

// What is handed to Python: the tensor with the strides of one that lies in order.
dlpack::ManagedTensor contiguous(const dlpack::Tensor& tensor, void* context,
                                 void (*deleter)(dlpack::ManagedTensor*)) {
  int64_t stride = 1;
  for (int32_t i = tensor.ndim - 1; i >= 0; --i) {
    tensor.strides[i] = stride;
    stride *= tensor.shape[i];
  }
  return {dlpack::kMajorVersion, dlpack::kMinorVersion, context, deleter, 0, tensor};
}

bool activation_of(PyObject* given, Activation& activation) {
  if (given == Py_None) return activation = Activation::none, true;
  if (!PyUnicode_Check(given)) return false;
  const std::pair<const char*, Activation> known[] = {
      {"relu", Activation::relu}, {"gelu", Activation::gelu}, {"silu", Activation::silu}};
  for (const auto& [name, code] : known) {
    if (PyUnicode_CompareWithASCIIString(given, name) == 0) return activation = code, true;
  }
  return false;
}

}  // namespace

bool unwatched(PyObject* const* numbers, size_t count) {
  if (!torch) return false;
  for (PyObject* const watcher : torch->watchers) {
    if (!says_no(PyObject_CallNoArgs(watcher))) return false;
  }
  PyObject* const level = PyDict_GetItemWithError(torch->forward_gradients, torch->level);
  if (!level || !PyLong_Check(level) || PyLong_AsLong(level) >= 0) return PyErr_Clear(), false;
  return std::all_of(numbers, numbers + count, [](PyObject* tensor) {
    return tensor == Py_None || says_no(PyObject_CallOneArg(torch->is_neg, tensor));
  });
}

bool DirectWeight::read(PyObject* const* given) {
  dlpack::Tensor values, crow, col;
  PyObject* const shape = given[3];
  int64_t N, K;
  Number number;
  if (!prunelm::read(given[0], values) || !prunelm::read(given[1], crow) ||
      !prunelm::read(given[2], col) || !PyTuple_Check(shape) || PyTuple_GET_SIZE(shape) != 2 ||
      !size_of(PyTuple_GET_ITEM(shape, 0), N) || !size_of(PyTuple_GET_ITEM(shape, 1), K) ||
      values.ndim != 3 || !number_of(values, number)) {
    return false;
  }
  const int64_t bn = values.shape[1], bk = values.shape[2];
  nnz = values.shape[0];
  if (bn < 1 || bk < 1 || std::max({nnz, bn, bk}) > INT32_MAX || bn * bk > INT32_MAX) return false;
  view = {values.data,
          number,
          static_cast<const int32_t*>(crow.data),
          static_cast<const int32_t*>(col.data),
          N,
          K,
          bn,
          bk};
  const bool bn_fastest =
      nnz == 0 || ((bn == 1 || values.strides[1] == 1) && (bk == 1 || values.strides[2] == bn) &&
                   (nnz == 1 || values.strides[0] == bn * bk));
  return bn_fastest && is_index(crow, view.block_rows() + 1) && is_index(col, nnz);
}

bool DirectRows::read(PyObject* x, int64_t K, Number weight) {
  Number number;
  if (!prunelm::read(x, tensor) || !number_of(tensor, number)) return false;
  const int64_t last = tensor.ndim - 1;
  if (last < 0 || K == 0 || tensor.shape[last] != K) return false;
  if (number != weight && (number != Number::f32 || weight == Number::f64)) return false;
  if (!is_contiguous(tensor)) return false;
  view = {tensor.data, number, numel_of(tensor) / K, K, K};
  return view.rows > 0;
}

bool DirectArray::read(PyObject* given, int32_t ndim) {
  return prunelm::read(given, tensor) && tensor.ndim == ndim && is_contiguous(tensor);
}

bool DirectArray::number(Number& number) const { return number_of(tensor, number); }

// A result as it is handed to Python; its numbers follow.
struct alignas(64) DirectResult::Block {
  dlpack::ManagedTensor managed;
  int64_t shape[16], strides[16];
};

void DirectResult::Delete::operator()(Block* block) const {
  ::operator delete(block, std::align_val_t{alignof(Block)});
}

bool DirectResult::prepare(const DirectRows& x, int64_t N, Number weight, PyObject* bias,
                           PyObject* activation) {
  const int64_t M = x.view.rows, ndim = x.tensor.ndim;
  view_ = {nullptr, x.view.number, M, N, nullptr, Number::f32, Activation::none};
  // Larger results do not wait for the dispatcher; smaller ones' sizes in bytes do not overflow.
  if (N == 0 || M > INT32_MAX / N || ndim > 16) return false;
  if (!activation_of(activation, view_.activation)) return false;
  if (bias != Py_None) {
    dlpack::Tensor added;
    if (!read(bias, added) || !number_of(added, view_.bias_number) || !is_list(added, N) ||
        (view_.bias_number != x.view.number && view_.bias_number != weight)) {
      return false;
    }
    view_.bias = added.data;
  }
  const size_t bytes = sizeof(Block) + size_t(M) * size_t(N) * (x.tensor.bits / 8);
  void* const memory = ::operator new(bytes, std::align_val_t{alignof(Block)});
  Block* const block = new (memory) Block;
  block_.reset(block);
  view_.data = block + 1;
  std::copy(x.tensor.shape, x.tensor.shape + ndim - 1, block->shape);
  block->shape[ndim - 1] = N;
  block->managed = contiguous(
      {view_.data, dlpack::kCPU, 0, int32_t(ndim), x.tensor.code, x.tensor.bits, 1, block->shape,
       block->strides, 0},
      block, [](dlpack::ManagedTensor* self) { Delete()(static_cast<Block*>(self->context)); });
  return true;
}

PyObject* DirectResult::tensor() && {
  void* made = nullptr;
  if (torch->exchange->managed_to_object(&block_->managed, &made) == 0) block_.release();
  return static_cast<PyObject*>(made);
}

struct alignas(64) DirectResults::Block {
  struct Item {
    dlpack::ManagedTensor managed;
    int64_t shape[4], strides[4];
  };
  std::atomic<size_t> holders;
  Item items[1];  // as many as there are arrays, then their numbers
};

DirectResults::DirectResults(std::initializer_list<Array> arrays) : count_(arrays.size()) {
  constexpr size_t kLine = alignof(Block);
  const auto whole_lines = [](size_t bytes) { return (bytes + kLine - 1) / kLine * kLine; };
  const auto bytes_of = [&](const Array& array) {
    return std::accumulate(array.shape.begin(), array.shape.end(), size_t(array.bits / 8),
                           std::multiplies());
  };
  const size_t head = whole_lines(sizeof(Block) + (count_ - 1) * sizeof(Block::Item));
  size_t bytes = head;
  for (const Array& array : arrays) bytes += whole_lines(bytes_of(array));
  block_ = new (::operator new(bytes, std::align_val_t{kLine})) Block;
  block_->holders = count_;
  char* data = reinterpret_cast<char*>(block_) + head;
  Block::Item* item = block_->items;
  for (const Array& array : arrays) {
    const auto ndim = int32_t(array.shape.size());
    std::copy(array.shape.begin(), array.shape.end(), item->shape);
    item->managed = contiguous(
        {data, dlpack::kCPU, 0, ndim, array.code, array.bits, 1, item->shape, item->strides, 0},
        block_, [](dlpack::ManagedTensor* self) { let_go(static_cast<Block*>(self->context)); });
    data += whole_lines(bytes_of(array));
    ++item;
  }
}

void DirectResults::let_go(Block* block) {
  if (--block->holders == 0) ::operator delete(block, std::align_val_t{alignof(Block)});
}

DirectResults::~DirectResults() {
  for (; handed_ < count_; ++handed_) let_go(block_);
}

void* DirectResults::operator[](size_t i) const { return block_->items[i].managed.tensor.data; }

PyObject* DirectResults::tuple() {
  PyObject* const made = PyTuple_New(Py_ssize_t(count_));
  if (!made) return nullptr;
  for (size_t i = 0; i < count_; ++i) {
    void* tensor = nullptr;
    if (torch->exchange->managed_to_object(&block_->items[i].managed, &tensor) != 0) {
      Py_DECREF(made);
      return nullptr;
    }
    ++handed_;
    PyTuple_SET_ITEM(made, Py_ssize_t(i), static_cast<PyObject*>(tensor));
  }
  return made;
}

void bind_readable(py::module_& m) { bind_direct(m, "readable", &readable); }

void look_up_torch() {
  try {
    torch = new Torch;
  } catch (const std::exception&) {
    // Another torch: calls go through its dispatcher.
  }
}

void bind_direct(py::module_& m, const char* name, DirectFunction function) {
  // Python reads the definition as long as the function lives, which is for good.
  auto* const definition =
      new PyMethodDef{name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)),
                      METH_FASTCALL, nullptr};
  m.add_object(name, py::reinterpret_steal<py::object>(PyCFunction_New(definition, nullptr)));
}

}  // namespace prunelm
