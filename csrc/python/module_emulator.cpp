// Recurrences of GPUs without one, for tests: the text of persistent kernels, run by core/emulator.h, and that of
// kernels of one step, of which all elements take their turns.
#include "core/stepwise.h"
#include "python/bind_persistent.h"
#include "python/bind_stepwise.h"
#include "python/emulate.h"

namespace seqkernels {
constexpr Place kPlace = {dlpack::kCpu, "a tensor on the CPU"};

namespace {

void emulate(const persistent::Launch& launch) {
  switch (launch.plan.cell) {
    case CellKind::kLstm:
      return persistent::emulate_lstm(launch);
    case CellKind::kGru:
      return persistent::emulate_gru(launch);
    default:
      return persistent::emulate_rnn(launch);
  }
}

template <class F>
void each_thread(const stepwise::Step& given, const F& f) {
  for (std::int64_t b = 0; b < given.batch; ++b) {
    for (int j = 0; j < given.hidden; j += stepwise::kWidth) f(b, j);
  }
}

void begin(stepwise::Product product, const stepwise::Begin& given) {
  stepwise::open(given);
  if (given.backward) return;
  stepwise::with_storage(product, [&](auto storage) {
    const stepwise::Enter<decltype(storage)> enter(given);
    each_thread(given.step, [&](std::int64_t b, int j) { enter.run(b, j); });
  });
}

template <bool kBackward>
void step(CellKind cell, stepwise::Product product, const stepwise::Step& given) {
  stepwise::Space& space = *given.space;
  stepwise::with_types(cell, product, [&](auto of_cell, auto storage) {
    using Pass = typename stepwise::PassOf<decltype(of_cell), decltype(storage), kBackward>::Type;
    const Pass pass(space.job, space.vectors, space.steps, given);
    pass.advance(space.steps);
    each_thread(given, [&](std::int64_t b, int j) { pass.run(b, j); });
  });
}

}  // namespace
}  // namespace seqkernels

PYBIND11_MODULE(_emulator, m) {
  using namespace seqkernels;
  m.doc() = "An emulator of recurrences on GPUs.";
  persistent_python::bind_plan(m);
  persistent_python::bind_passes(m,
                                 [](const persistent::Launch& launch, const Tensor&, const persistent_python::Beside&) {
                                   const py::gil_scoped_release release;
                                   emulate(launch);
                                 });
  stepwise_python::Runner steps;
  steps.prepare = [](CellKind, stepwise::Product, bool, const Tensor&) {};
  steps.begin = [](stepwise::Product product, const stepwise::Begin& given, const Tensor&,
                   const persistent_python::Beside&) { begin(product, given); };
  steps.step = [](CellKind cell, stepwise::Product product, bool backward, const stepwise::Step& given, const Tensor&) {
    backward ? step<true>(cell, product, given) : step<false>(cell, product, given);
  };
  stepwise_python::bind_steps(m, steps);
}
