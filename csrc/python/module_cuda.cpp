#include <pybind11/stl.h>

#include <map>
#include <optional>
#include <string>
#include <utility>

#include "cuda/launch.h"
#include "cuda/persistent.h"
#include "cuda/stepwise.h"
#include "python/bind_persistent.h"
#include "python/bind_stepwise.h"
#include "python/tensor.h"
#include "python/work.h"

namespace seqkernels {

constexpr Place kPlace = {dlpack::kCuda, "a tensor on a CUDA device"};

namespace {

constexpr int kLeastMajor = 8;  // of the compute capability of the oldest target

std::string version_text(int version) {
  return version == 0 ? "none" : std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::map<std::string, std::string> build_info() {
  std::map<std::string, std::string> info;
  info["cuda"] = version_text(CUDART_VERSION);
  info["targets"] = SEQKERNELS_CUDA_TARGETS;
  info["compiler"] = "nvcc " SEQKERNELS_NVCC ", gcc " __VERSION__;
  return info;
}

std::optional<std::string> device_error() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    cudaGetLastError();
    int driver = 0, runtime = 0;
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    return std::string(cudaGetErrorString(error)) + " (driver for CUDA " + version_text(driver) + ", module of CUDA " +
           version_text(runtime) + ")";
  }
  int newest = 0;
  for (int device = 0; device < count; ++device) {
    int major = 0;
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess) {
      newest = std::max(newest, major);
    }
  }
  if (newest >= kLeastMajor) return std::nullopt;
  return "no device has compute capability " + std::to_string(kLeastMajor) + ".0 or later";
}

// Of a device: what plans depend on.
std::map<std::string, int> device(int number) {
  const cuda::DeviceGuard guard(number);
  const persistent::Device found = persistent::current_device();
  return {{"capability", found.capability},
          {"processors", found.processors},
          {"shared_memory", found.shared_memory},
          {"cluster", found.cluster}};
}

void run(const persistent::Launch& launch, const Tensor& first, const persistent_python::Beside& others) {
  const Work work(first, others);
  const py::gil_scoped_release release;
  persistent::run(launch, work.stream());
}

stepwise_python::Runner run_steps() {
  stepwise_python::Runner run;
  run.prepare = [](CellKind cell, stepwise::Product product, bool backward, const Tensor& space) {
    const Work work(space);
    stepwise::prepare(cell, product, backward);
  };
  run.begin = [](stepwise::Product product, const stepwise::Begin& given, const Tensor& first,
                 const persistent_python::Beside& others) {
    const Work work(first, others);
    stepwise::begin(product, given, work.stream());
  };
  run.step = [](CellKind cell, stepwise::Product product, bool backward, const stepwise::Step& given,
                const Tensor& space) {
    const Work work(space);
    stepwise::step(cell, product, backward, given, work.stream());
  };
  return run;
}

// A stream of the current device, for good: torch hands out its own to anybody.
std::uintptr_t make_stream(int device) {
  const cuda::DeviceGuard guard(device);
  cudaStream_t stream = nullptr;
  cuda::check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
  return reinterpret_cast<std::uintptr_t>(stream);
}

std::pair<int, std::uintptr_t> work(Argument first_, OptionalArgument second_) {
  const Tensor first(first_, "first"), second(second_, "second", true);
  const Work work(first, {&second});
  return {work.device(), reinterpret_cast<std::uintptr_t>(work.stream())};
}

}  // namespace
}  // namespace seqkernels

PYBIND11_MODULE(_C_cuda, m) {
  using namespace seqkernels;
  m.doc() = "The compiled CUDA kernels of seqkernels.";
  m.def("build_info", &build_info, "How this module was compiled.");
  m.def("device_error", &device_error,
        "Why there is no device for these kernels, in CUDA's words; None where there is.");
  m.def("device", &device, py::arg("number"), "What plans depend on, of a device.");
  persistent_python::bind_plan(m);
  persistent_python::bind_passes(m, &run);
  stepwise_python::bind_steps(m, run_steps());
  m.def("make_stream", &make_stream, py::arg("device"),
        "A new stream of a device, which lives as long as the process.");
  m.def("work", &work, py::arg("first"), py::arg("second") = py::none(),
        "The number of the device and the stream that kernels of a call with these tensors are launched on.");
}
