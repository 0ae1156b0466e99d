// A recurrence of a launch for each step as Python calls it: of the module of CUDA kernels, and of the emulator.
#pragma once

#include <functional>
#include <string>

#include "core/stepwise_job.h"
#include "python/bind_persistent.h"

namespace seqkernels {

namespace stepwise_python {

using stepwise::Begin;
using stepwise::Product;
using stepwise::Space;
using stepwise::Step;

// What runs the passes; each is given a tensor of theirs and those that have to be beside it.
struct Runner {
  std::function<void(CellKind, Product, bool, const Tensor&)> prepare;
  std::function<void(Product, const Begin&, const Tensor&, const persistent_python::Beside&)> begin;
  std::function<void(CellKind, Product, bool, const Step&, const Tensor&)> step;
};

// The launches of one kind of call, and the memory that they have in common.
class Steps {
 public:
  Steps(const Runner& run, const std::string& cell, const std::string& product, bool backward, std::int64_t hidden,
        std::int64_t batch, py::handle space, py::handle operand, py::handle product_tensor)
      : run_(run),
        shape_(cell_shape(cell)),
        product_(persistent_python::product_of(product)),
        backward_(backward),
        space_(space, "space"),
        operand_(operand, "operand"),
        made_(product_tensor, "product_tensor") {
    using persistent_python::positive;
    if (positive("hidden", hidden) > 1 << 24) fail_argument("hidden", "a size up to 2^24", std::to_string(hidden));
    if (positive("batch", batch) > 1 << 30) fail_argument("batch", "a size up to 2^30", std::to_string(batch));
    const std::int64_t gates = shape_.gates * hidden;
    space_.expect({sizeof(Space)}).expect_code(dlpack::kUInt, 8, "uint8").expect_contiguous();
    operand_.expect({batch, backward ? gates : hidden}).expect(persistent_python::storage_of(product_));
    operand_.expect_contiguous().expect_device_of(space_);
    made_.expect({batch, backward ? hidden : gates}).expect(DType::kFloat32).expect_contiguous();
    made_.expect_device_of(space_);
    if (reinterpret_cast<std::uintptr_t>(space_.data()) % alignof(Space) != 0) {
      fail_argument("space", "memory at a multiple of " + std::to_string(alignof(Space)) + " bytes", "another place");
    }
    given_.space = static_cast<Space*>(space_.data());
    given_.hidden = static_cast<int>(hidden);
    given_.batch = static_cast<int>(batch);
    given_.product = static_cast<const float*>(made_.data());
    given_.operand = operand_.data();
    run_.prepare(shape_.kind, product_, backward, space_);
  }

  // Before the steps of a call, a job as a launch of persistent recurrences has it.
  template <class Arguments>
  void begin(const py::tuple& job) {
    const auto run = [this](const persistent::Launch& launch, const Tensor& first,
                            const persistent_python::Beside& others) {
      Begin begin{};
      begin.step = given_;
      begin.job = launch.job[0];
      begin.backward = backward_;
      begin.vectors = stepwise::has_vectors(given_, begin.job, persistent::bytes_of(product_));
      first.expect_device_of(space_);
      run_.begin(product_, begin, first, others);
    };
    persistent_python::launch<Arguments>(run, sizes(), py::make_tuple(job));
  }

  void step(int turn) {
    if (turn != 0 && turn != 1) fail_argument("turn", "0 or 1", std::to_string(turn));
    Step given = given_;
    given.turn = turn;
    run_.step(shape_.kind, product_, backward_, given, space_);
  }

 private:
  // What the checks of arguments look at of a plan.
  persistent::Plan sizes() const {
    persistent::Plan plan{};
    plan.tier = persistent::Tier::kBlock;
    plan.cell = shape_.kind;
    plan.product = product_;
    plan.backward = backward_;
    plan.hidden = given_.hidden;
    plan.batch = given_.batch;
    plan.blocks = plan.slices = 1;
    plan.units = plan.rows = 8;
    plan.stages = 2;
    plan.split = {1, 1, 0, 2};
    return plan;
  }

  const Runner run_;
  const CellShape shape_;
  const Product product_;
  const bool backward_;
  const Tensor space_, operand_, made_;
  Step given_{};
};

inline void bind_steps(py::module_& m, const Runner& run) {
  m.attr("SPACE_BYTES") = sizeof(Space);
  py::class_<Steps>(m, "Steps", py::module_local(), "The launches of a recurrence that has one for each step.")
      .def(py::init([run](const std::string& cell, const std::string& product, bool backward, std::int64_t hidden,
                          std::int64_t batch, Argument space, Argument operand, Argument product_tensor) {
             return new Steps(run, cell, product, backward, hidden, batch, space, operand, product_tensor);
           }),
           py::arg("cell"), py::arg("product"), py::arg("backward"), py::arg("hidden"), py::arg("batch"),
           py::arg("space"), py::arg("operand"), py::arg("product_tensor"),
           "Memory: space (SPACE_BYTES) uint8; operand (B, H) and product_tensor (B, G*H) float32, or in a backward\n"
           "pass (B, G*H) and (B, H). They have to outlive this.")
      .def("begin_forward", &Steps::begin<persistent_python::ForwardArguments>, py::arg("job"),
           "Before the steps of a call: a job of recurrence_forward, whose first h goes into the operand.")
      .def("begin_backward", &Steps::begin<persistent_python::BackwardArguments>, py::arg("job"),
           "Before the steps of a call: a job of recurrence_backward.")
      .def("step", &Steps::step, py::arg("turn"),
           "The pass of a step, after its product (forward), or before it; back there is one more at the end. Their\n"
           "turns are 0, 1, 0, ...");
}

}  // namespace stepwise_python
}  // namespace seqkernels
