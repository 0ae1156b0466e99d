#include "python/tensor.h"

namespace seqkernels {
namespace {

// The exchange table of a type, looked up once per type; null where it has none. Tensors and parameters come in turns.
const dlpack::ExchangeApi* exchange_api(PyTypeObject* type) {
  struct Known {
    PyTypeObject* type;
    const dlpack::ExchangeApi* api;
  };
  static Known known[4] = {};  // guarded by the GIL; types with a table live for ever in practice
  static int count = 0;
  for (int i = 0; i < count; ++i) {
    if (known[i].type == type) return known[i].api;
  }
  py::object capsule =
      py::getattr(py::handle(reinterpret_cast<PyObject*>(type)), "__dlpack_c_exchange_api__", py::none());
  const dlpack::ExchangeApi* api = nullptr;
  if (PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) {
    api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    while (api != nullptr && api->version.major != 1) api = api->previous;
    if (api != nullptr && api->tensor_from_object == nullptr) api = nullptr;
  }
  if (api != nullptr && count < 4) {
    Py_INCREF(type);
    known[count++] = {type, api};
  }
  return api;
}

std::string dtype_text(dlpack::DataType dtype) {
  const char* kind = dtype.code == dlpack::kFloat    ? "float"
                     : dtype.code == dlpack::kBfloat ? "bfloat"
                     : dtype.code == dlpack::kUInt   ? "uint"
                     : dtype.code == dlpack::kBool   ? "bool"
                     : dtype.code == 0               ? "int"
                                                     : "dtype code ";
  if (dtype.code == dlpack::kBool) return kind;
  return std::string(kind) + std::to_string(dtype.bits);
}

std::string device_text(dlpack::Device device) {
  if (device.type == dlpack::kCpu) return "the CPU";
  if (device.type == dlpack::kCuda) return "cuda:" + std::to_string(device.id);
  return "a device of DLPack's type " + std::to_string(device.type);
}

const char* dtype_text(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kFloat64:
      return "float64";
    case DType::kBFloat16:
      return "bfloat16";
    default:
      return "float16";
  }
}

}  // namespace

void fail_argument(const char* name, const std::string& expected, const std::string& got) {
  throw py::value_error(std::string(name) + ": expected " + expected + ", got " + got);
}

int check_threads(int threads) {
  if (threads < 1) fail_argument("threads", "at least 1", std::to_string(threads));
  return threads;
}

void Tensor::fail(const std::string& expected, const std::string& got, bool type) const {
  if (type) throw py::type_error(std::string(name_) + ": expected " + expected + ", got " + got);
  fail_argument(name_, expected, got);
}

Tensor::Tensor(py::handle object, const char* name, bool optional) : name_(name) {
  if (object.is_none()) {
    if (!optional) fail("a tensor", "None", true);
    return;
  }
  dlpack::Tensor view{};
  api_ = exchange_api(Py_TYPE(object.ptr()));
  if (api_ != nullptr) {
    if (api_->tensor_from_object(object.ptr(), &view) != 0) throw py::error_already_set();
  } else {
    if (!py::hasattr(object, "__dlpack__")) {
      fail("a tensor", py::cast<std::string>(py::str(py::type::of(object))), true);
    }
    owner_ = object.attr("__dlpack__")();
    if (!PyCapsule_IsValid(owner_.ptr(), "dltensor")) fail("a DLPack capsule named dltensor", "another", true);
    // Not renamed to "used_dltensor": the capsule frees the tensor when this view goes.
    view = static_cast<dlpack::Managed*>(PyCapsule_GetPointer(owner_.ptr(), "dltensor"))->tensor;
  }
  if (view.device.type != kPlace.device_type) fail(kPlace.text, "one on " + device_text(view.device));
  if (view.ndim > 4) fail("at most 4 dimensions", std::to_string(view.ndim));
  present_ = true;
  rank_ = view.ndim;
  device_ = view.device;
  dtype_ = view.dtype;
  std::int64_t contiguous = 1;
  for (int i = rank_ - 1; i >= 0; --i) {
    shape_[i] = view.shape[i];
    strides_[i] = view.strides == nullptr ? contiguous : view.strides[i];
    contiguous *= view.shape[i];
  }
  if (view.data == nullptr) {
    if (contiguous != 0) fail("a tensor with memory", "one without");
    return;
  }
  data_ = static_cast<char*>(view.data) + view.byte_offset;
}

bool Tensor::is(DType dtype) const {
  switch (dtype) {
    case DType::kFloat32:
      return dtype_.code == dlpack::kFloat && dtype_.bits == 32;
    case DType::kFloat64:
      return dtype_.code == dlpack::kFloat && dtype_.bits == 64;
    case DType::kFloat16:
      return dtype_.code == dlpack::kFloat && dtype_.bits == 16;
    default:
      return dtype_.code == dlpack::kBfloat && dtype_.bits == 16;
  }
}

Tensor& Tensor::flatten(int rank) {
  if (present_ && rank_ == rank + 1 && shape_[0] == 1) {
    for (int i = 0; i < rank; ++i) {
      shape_[i] = shape_[i + 1];
      strides_[i] = strides_[i + 1];
    }
    rank_ = rank;
  }
  return *this;
}

DType Tensor::dtype() const {
  for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
    if (is(dtype)) return dtype;
  }
  fail("float32, float64, bfloat16 or float16", dtype_text(dtype_), true);
}

const Tensor& Tensor::expect(DType dtype) const {
  if (present_ && !is(dtype)) fail(dtype_text(dtype), dtype_text(dtype_), true);
  return *this;
}

const Tensor& Tensor::expect_code(std::uint8_t code, int bits, const char* dtype) const {
  if (present_ && (dtype_.code != code || dtype_.bits != bits)) fail(dtype, dtype_text(dtype_), true);
  return *this;
}

std::string Tensor::shape_text() const {
  std::string text = "(";
  for (int i = 0; i < rank_; ++i) text += (i ? ", " : "") + std::to_string(shape_[i]);
  return text + ")";
}

const Tensor& Tensor::expect(std::initializer_list<std::int64_t> shape) const {
  if (!present_) return *this;
  bool fits = static_cast<std::size_t>(rank_) == shape.size();
  std::string text = "shape (";
  int dim = 0;
  for (const std::int64_t want : shape) {
    text += (dim ? ", " : "") + (want == kAny ? std::string("any") : std::to_string(want));
    fits = fits && (want == kAny || shape_[dim] == want);
    ++dim;
  }
  if (!fits) fail(text + ")", shape_text());
  return *this;
}

bool Tensor::empty() const {
  for (int i = 0; i < rank_; ++i) {
    if (shape_[i] == 0) return true;
  }
  return false;
}

const Tensor& Tensor::expect_contiguous() const {
  if (!present_ || empty()) return *this;
  std::int64_t contiguous = 1;
  for (int i = rank_ - 1; i >= 0; --i) {
    if (shape_[i] != 1 && strides_[i] != contiguous) fail("a contiguous tensor", "strided " + shape_text());
    contiguous *= shape_[i];
  }
  return *this;
}

const Tensor& Tensor::expect_last_contiguous() const {
  if (present_ && !empty() && rank_ > 0 && shape_[rank_ - 1] > 1 && strides_[rank_ - 1] != 1) {
    fail("a contiguous last dimension", "stride " + std::to_string(strides_[rank_ - 1]));
  }
  return *this;
}

const Tensor& Tensor::expect_device_of(const Tensor& other) const {
  if (present_ && other.present_ && device_.id != other.device_.id) {
    fail(std::string("a tensor on ") + device_text(other.device_) + ", as " + other.name_,
         "one on " + device_text(device_));
  }
  return *this;
}

void* Tensor::stream() const {
  void* stream = nullptr;
  // Others are asked for their memory as the default stream finds it.
  if (api_ == nullptr) return stream;
  if (api_->current_work_stream(device_.type, device_.id, &stream) != 0) throw py::error_already_set();
  return stream;
}

Strided Tensor::strided() const {
  if (!present_) return {nullptr, {0, 0, 0, 0}};
  return {data_, {strides_[0], strides_[1], strides_[2], strides_[3]}};
}

StridedOut Tensor::strided_out() const {
  if (!present_) return {nullptr, {0, 0, 0, 0}};
  return {data_, {strides_[0], strides_[1], strides_[2], strides_[3]}};
}

}  // namespace seqkernels
