// Persistent recurrences without a GPU, for tests: the text of the kernels, run by core/emulator.h.
#include "core/emulator.h"
#include "python/bind_persistent.h"

namespace seqkernels {
constexpr Place kPlace = {dlpack::kCpu, "a tensor on the CPU"};
}  // namespace seqkernels

PYBIND11_MODULE(_emulator, m) {
  using namespace seqkernels;
  m.doc() = "An emulator of persistent recurrences.";
  persistent_python::bind_plan(m);
  persistent_python::bind_passes(m,
                                 [](const persistent::Launch& launch, const Tensor&, const persistent_python::Beside&) {
                                   const py::gil_scoped_release release;
                                   persistent::emulate(launch, persistent::run_product);
                                 });
}
