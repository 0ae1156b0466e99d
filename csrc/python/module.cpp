#include <pybind11/stl.h>

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "core/kernels.h"
#include "python/tensor.h"

namespace seqkernels {

constexpr Place kPlace = {dlpack::kCpu, "a tensor on the CPU"};

namespace {

std::map<std::string, std::string> build_info() {
  std::map<std::string, std::string> info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["cxx_standard"] = std::to_string(__cplusplus);
  info["pybind11"] = std::to_string(PYBIND11_VERSION_MAJOR) + "." + std::to_string(PYBIND11_VERSION_MINOR);
  info["openmp"] = std::to_string(_OPENMP);
  info["sanitizers"] = SEQKERNELS_SANITIZE;
#if defined(SEQKERNELS_HAS_baseline)
  info["instruction_sets"] = "baseline";
#else
  info["instruction_sets"] = "x86-64-v2 x86-64-v3 x86-64-v4";
#endif
  return info;
}

std::vector<std::string> isas() {
  const Kernels* tables[4];
  const int count = available_kernels(tables);
  std::vector<std::string> names;
  for (int i = 0; i < count; ++i) names.emplace_back(tables[i]->isa);
  return names;
}

void set_isa(const std::optional<std::string>& name) {
  if (choose_kernels(name ? name->c_str() : nullptr)) return;
  std::string allowed;
  for (const std::string& isa : isas()) allowed += (allowed.empty() ? "" : ", ") + isa;
  fail_argument("name", "one of " + allowed, *name);
}

void activation(const std::string& name, Argument x_, Argument y_) {
  const Tensor x(x_, "x"), y(y_, "y");
  if (name != "exp" && name != "sigmoid" && name != "tanh") fail_argument("name", "exp, sigmoid or tanh", name);
  const DType dtype = x.expect({kAny}).expect_contiguous().dtype();
  if (compute_dtype(dtype) != dtype) fail_argument("x", "float32 or float64", "16-bit numbers");
  y.expect({x.size(0)}).expect(dtype).expect_contiguous();
  kernels().activation(name.c_str(), x.size(0), x.data(), y.data(), dtype);
}

}  // namespace
}  // namespace seqkernels

PYBIND11_MODULE(_C, m) {
  using namespace seqkernels;
  m.doc() = "The compiled CPU kernels of seqkernels.";
  if (isas().empty()) throw py::import_error("this processor lacks x86-64-v2, the least instruction set built");
  bind_recurrence(m);
  bind_attention(m);
  bind_step(m);
  bind_rotary(m);
  m.def("build_info", &build_info, "How this module was compiled.");
  m.def("isas", &isas, "Instruction sets that were built and that this processor has, best last.");
  m.def("isa", [] { return std::string(kernels().isa); }, "The instruction set in use.");
  m.def("set_isa", &set_isa, py::arg("name"), "Use one of isas(); None for the best.");
  m.def("activation", &activation, py::arg("name"), py::arg("x"), py::arg("y"),
        "exp, sigmoid or tanh of x into y, as the kernels compute them.");
}
