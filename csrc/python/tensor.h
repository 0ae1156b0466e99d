// From a Python tensor to a typed, shape-checked view. Anything with a DLPack exchange table is read through it
// (0.1 us a tensor, nothing owned: the caller's arguments keep the memory alive); other types through __dlpack__().
// An argument that does not fit raises TypeError or ValueError with its name.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/typing.h>

#include <array>
#include <string>

#include "core/attention.h"
#include "core/types.h"
#include "python/dlpack.h"

namespace seqkernels {

namespace py = pybind11;

constexpr std::int64_t kAny = -1;  // a dimension that may have any size

// Where tensors lie that a module reads. Each module defines its own.
struct Place {
  std::int32_t device_type;
  const char* text;  // for errors: "a tensor on the CPU"
};
extern const Place kPlace;

// An argument that `Tensor` is to read: any object, of which signatures say what it should be.
struct Argument {
  operator py::handle() const { return object; }
  py::handle object;
};
struct OptionalArgument : Argument {};
using OptionalArguments = py::typing::Tuple<OptionalArgument, py::ellipsis>;

class Tensor {
 public:
  // Reads `object`. None gives an absent tensor where `optional`.
  Tensor(py::handle object, const char* name, bool optional = false);

  explicit operator bool() const { return present_; }
  void* data() const { return data_; }
  int rank() const { return rank_; }
  std::int64_t size(int dim) const { return shape_[dim]; }
  std::int64_t stride(int dim) const { return strides_[dim]; }
  DType dtype() const;
  int device_id() const { return device_.id; }
  void* stream() const;  // that its caller works on; null, the default one, where its type does not say

  // Without its first dimension where that is 1 and there are `rank` others.
  Tensor& flatten(int rank);

  // Each raises the error that names the argument, or returns the tensor. All accept an absent tensor.
  const Tensor& expect(std::initializer_list<std::int64_t> shape) const;  // kAny for a free dimension
  const Tensor& expect(DType dtype) const;
  const Tensor& expect_code(std::uint8_t code, int bits, const char* dtype) const;
  const Tensor& expect_contiguous() const;
  const Tensor& expect_last_contiguous() const;
  const Tensor& expect_device_of(const Tensor& other) const;

  Strided strided() const;
  StridedOut strided_out() const;

 private:
  [[noreturn]] void fail(const std::string& expected, const std::string& got, bool type = false) const;
  std::string shape_text() const;
  bool is(DType dtype) const;
  bool empty() const;  // strides mean nothing then

  const char* name_;
  bool present_ = false;
  void* data_ = nullptr;
  int rank_ = 0;
  dlpack::Device device_{};
  const dlpack::ExchangeApi* api_ = nullptr;
  dlpack::DataType dtype_{};
  std::array<std::int64_t, 4> shape_{}, strides_{};
  py::object owner_;
};

inline DType compute_dtype(DType dtype) { return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

// Errors of plain arguments, in the same form.
[[noreturn]] void fail_argument(const char* name, const std::string& expected, const std::string& got);
int check_threads(int threads);

// Calls a kernel, without the interpreter's lock unless it is `brief`: some microseconds, not worth the handover.
template <class Kernel, class Params>
void call(Kernel kernel, const Params& p, bool brief) {
  if (brief) return kernel(p);
  const py::gil_scoped_release release;
  kernel(p);
}

void bind_recurrence(py::module_& m);
void bind_attention(py::module_& m);
void bind_step(py::module_& m);
void bind_rotary(py::module_& m);

}  // namespace seqkernels

namespace pybind11::detail {

template <>
struct type_caster<seqkernels::Argument> {
  PYBIND11_TYPE_CASTER(seqkernels::Argument, const_name("torch.Tensor"));
  bool load(handle object, bool) {
    value.object = object;
    return true;
  }
};

template <>
struct type_caster<seqkernels::OptionalArgument> {
  PYBIND11_TYPE_CASTER(seqkernels::OptionalArgument, const_name("torch.Tensor | None"));
  bool load(handle object, bool) {
    value.object = object;
    return true;
  }
};

}  // namespace pybind11::detail
