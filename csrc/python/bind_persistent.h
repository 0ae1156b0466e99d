// Persistent recurrences as Python calls them: of the module of CUDA kernels, and of the emulator of the tests.
#pragma once

#include <functional>
#include <string>

#include "core/persistent_job.h"
#include "python/cell.h"
#include "python/tensor.h"

namespace seqkernels {

namespace persistent_python {

using namespace persistent;

template <class T, std::size_t kCount>
T named(const char* argument, const std::pair<const char*, T> (&all)[kCount], const std::string& name) {
  std::string allowed;
  for (const auto& [known, value] : all) {
    if (name == known) return value;
    allowed += (allowed.empty() ? "'" : ", '") + std::string(known) + "'";
  }
  fail_argument(argument, "one of " + allowed, "'" + name + "'");
}

inline Tier tier_of(const std::string& name) {
  return named<Tier>("tier", {{"block", Tier::kBlock}, {"cluster", Tier::kCluster}, {"grid", Tier::kGrid}}, name);
}
inline Product product_of(const std::string& name) {
  return named<Product>("product",
                        {{"float16", Product::kFloat16},
                         {"bfloat16", Product::kBFloat16},
                         {"tf32x3", Product::kTf32x3},
                         {"exact", Product::kExact}},
                        name);
}
inline const char* text(Tier tier) {
  return tier == Tier::kBlock ? "block" : tier == Tier::kCluster ? "cluster" : "grid";
}
inline DType storage_of(Product product) {
  return product == Product::kFloat16    ? DType::kFloat16
         : product == Product::kBFloat16 ? DType::kBFloat16
                                         : DType::kFloat32;
}

inline std::int64_t positive(const char* name, std::int64_t value) {
  if (value < 1) fail_argument(name, "1 or more", std::to_string(value));
  return value;
}

// A plan of given sizes, on no device in particular.
inline Plan make_plan(const std::string& tier, const std::string& cell, const std::string& product, bool backward,
                      std::int64_t hidden, std::int64_t batch, std::int64_t units, std::int64_t rows) {
  if (units % kUnits != 0 || positive("units", units) > kThreads) {
    fail_argument("units", "a multiple of 8 up to 256", std::to_string(units));
  }
  if (rows % 8 != 0 || positive("rows", rows) > 64) {
    fail_argument("rows", "a multiple of 8 up to 64", std::to_string(rows));
  }
  if (positive("hidden", hidden) > 1 << 14) fail_argument("hidden", "a size up to 2^14", std::to_string(hidden));
  if (positive("batch", batch) > 1 << 24) fail_argument("batch", "a size up to 2^24", std::to_string(batch));
  const Plan plan =
      layout(tier_of(tier), cell_shape(cell).kind, product_of(product), backward, static_cast<int>(hidden),
             static_cast<int>(batch), static_cast<int>(units), static_cast<int>(rows));
  if (plan.tier == Tier::kBlock && plan.blocks != 1) {
    fail_argument("units", "all " + std::to_string(hidden) + " where the tier is 'block'", std::to_string(units));
  }
  if (plan.tier == Tier::kCluster && plan.blocks == 1) {
    fail_argument("units", "fewer than all " + std::to_string(hidden) + " where the tier is 'cluster'",
                  std::to_string(units));
  }
  return plan;
}

inline void bind_plan(py::module_& m) {
  py::class_<Plan>(m, "Plan", py::module_local(), "How a recurrence is laid out over blocks.")
      .def_property_readonly("tier", [](const Plan& p) { return text(p.tier); })
      .def_readonly("backward", &Plan::backward)
      .def_readonly("tall", &Plan::tall, "Whether warps hold 8 by 4 tiles in place of 4 by 8.")
      .def_readonly("blocks", &Plan::blocks, "Of a team.")
      .def_readonly("units", &Plan::units, "Hidden units of a block.")
      .def_readonly("rows", &Plan::rows, "Rows of the batch of a team.")
      .def_readonly("slices", &Plan::slices, "Teams.")
      .def_readonly("stages", &Plan::stages, "Steps whose operands are on their way or in use.")
      .def_property_readonly("row_warps", [](const Plan& p) { return p.split.row_warps; })
      .def_property_readonly("column_warps", [](const Plan& p) { return p.split.column_warps; })
      .def_property_readonly("batches", &Plan::batches)
      .def_property_readonly(
          "columns", [](const Plan& p) { return p.split.columns; }, "Of tiles, of a warp.")
      .def_property_readonly(
          "tile_rows_of_warp", [](const Plan& p) { return p.held_tiles().rows; }, "In each batch.")
      .def_property_readonly("tail_tiles", &Plan::tail_tiles, "Tiles of a warp that are in shared memory.")
      .def_property_readonly(
          "shared_memory", [](const Plan& p) { return p.memory().total; }, "Bytes of a block.")
      .def_property_readonly("exchange_bytes", &Plan::exchange_bytes, "Bytes of memory that blocks exchange through.")
      .def_property_readonly("flags", &Plan::flags, "Their number.");
  m.def("plan", &make_plan, py::arg("tier"), py::arg("cell"), py::arg("product"), py::arg("backward"),
        py::arg("hidden"), py::arg("batch"), py::arg("units"), py::arg("rows"),
        "The plan of a call with given sizes, on no device yet.");
}

// The fields of seqkernels.backends._through_time.Parts, and with them those of a loop that both passes share.
class LoopArguments {
 public:
  LoopArguments(const Plan& plan, py::handle weight_hh, py::handle carry, py::handle states, py::handle control,
                const py::tuple& parts, const std::string& cell, bool reverse, std::int64_t first, std::int64_t count,
                std::int64_t base, std::int64_t steps, py::handle exchange, py::handle flags)
      : plan_(plan),
        shape_(cell_shape(cell)),
        storage_(storage_of(plan.product)),
        steps_(steps),
        weight_hh_(weight_hh, "weight_hh"),
        carry_(carry, "carry"),
        states_(states, "states"),
        control_(control, "control", true),
        bias_ih_(part(parts, 0), "bias_ih", true),
        bias_hh_(part(parts, 1), "bias_hh", true),
        reset_state_(part(parts, 2), "reset_state", true),
        peephole_(part(parts, 3), "peephole", true),
        recurrent_mask_(part(parts, 4), "recurrent_mask", true),
        zoneout_(part(parts, 7), "zoneout", true),
        seed_(part(parts, 8), "seed", true),
        exchange_(exchange, "exchange", true),
        flags_(flags, "flags", true) {
    if (!part(parts, 5).is_none()) fail_argument("norm_h", "None", "a tensor");
    if (!part(parts, 6).is_none()) fail_argument("norm_c", "None", "a tensor");
    const std::int64_t H = plan.hidden, B = plan.batch, rows = shape_.gates * H, S = shape_.states;
    const bool same = gates_of(plan.cell) == shape_.gates;
    if (!same) fail_argument("cell", "that of the plan", "'" + cell + "'");
    weight_hh_.expect({rows, H}).expect(storage_).expect_contiguous();
    carry_.expect({S, B, H}).expect(DType::kFloat32).expect_contiguous();
    states_.expect({kAny, kAny, B, H}).expect(storage_).expect_contiguous();
    control_.expect({steps, B}).expect_code(dlpack::kUInt, 8, "uint8").expect_contiguous();
    bias_ih_.expect({rows}).expect(storage_).expect_contiguous();
    bias_hh_.expect({rows}).expect(storage_).expect_contiguous();
    reset_state_.expect({S, H}).expect(storage_).expect_contiguous();
    peephole_.expect({3, H}).expect(storage_).expect_contiguous();
    recurrent_mask_.expect({B, H}).expect(storage_).expect_contiguous();
    zoneout_.expect({S}).expect(DType::kFloat32).expect_contiguous();
    seed_.expect({}).expect_code(dlpack::kInt, 64, "int64");
    exchange_.expect({kAny}).expect_code(dlpack::kUInt, 8, "uint8").expect_contiguous();
    flags_.expect({kAny}).expect_code(dlpack::kInt, 32, "int32").expect_contiguous();
    if (plan.tier == Tier::kGrid) {
      expect_size(exchange_, "exchange", plan.exchange_bytes());
      expect_size(flags_, "flags", plan.flags());
      if (reinterpret_cast<std::uintptr_t>(exchange_.data()) % 16 != 0) {
        fail_argument("exchange", "memory at a multiple of 16 bytes", "another place");
      }
    }
    // Rows of the states: of the steps from `base` on, and one more.
    const std::int64_t last = reverse != plan.backward ? first - count + 1 : first + count - 1;
    if (count < 1 || least(first, last) < base || most(first, last) >= base + states_.size(1) - 1 ||
        most(first, last) >= steps || least(first, last) < 0) {
      fail_argument("first", "steps that are there",
                    std::to_string(first) + " and " + std::to_string(count) + " from it on");
    }
    job_.first = first;
    job_.count = count;
    job_.base = base;
    job_.reverse = reverse;
    job_.relu = shape_.kind == CellKind::kRnnRelu;
    job_.weight_hh = weight_hh_.data();
    job_.carry = static_cast<float*>(carry_.data());
    job_.states = states_.data();
    job_.state_plane = states_.size(0) > 1 ? states_.stride(0) : 0;
    job_.control = static_cast<const std::uint8_t*>(control_.data());
    job_.bias_ih = bias_ih_.data();
    job_.bias_hh = bias_hh_.data();
    job_.reset_state = reset_state_.data();
    job_.peephole = peephole_.data();
    job_.recurrent_mask = recurrent_mask_.data();
    job_.zoneout = static_cast<const float*>(zoneout_.data());
    job_.seed = static_cast<const std::int64_t*>(seed_.data());
    job_.exchange = exchange_.data();
    job_.flags = static_cast<std::uint32_t*>(flags_.data());
  }

  // A tensor of each step in memory, of `width` elements to a row of the batch.
  template <class T>
  T* of_steps(const Tensor& tensor, DType dtype, std::int64_t width) const {
    tensor.expect({steps_, plan_.batch, width}).expect(dtype).expect_contiguous();
    return static_cast<T*>(tensor.data());
  }
  float* sums(const Tensor& tensor, std::int64_t count) const {
    tensor.expect({count, plan_.batch, plan_.hidden}).expect(DType::kFloat32).expect_contiguous();
    return static_cast<float*>(tensor.data());
  }
  // The gates that a pass keeps, of the steps that states has.
  float* reserve(const Tensor& tensor) const {
    tensor.expect({states_.size(1) - 1, plan_.batch, shape_.reserve, plan_.hidden}).expect(DType::kFloat32);
    tensor.expect_contiguous();
    return static_cast<float*>(tensor.data());
  }

  const Plan& plan_;
  const CellShape shape_;
  const DType storage_;
  const std::int64_t steps_;
  Job job_{};
  Tensor weight_hh_, carry_, states_, control_, bias_ih_, bias_hh_, reset_state_, peephole_, recurrent_mask_, zoneout_,
      seed_, exchange_, flags_;

 private:
  static py::handle part(const py::tuple& parts, std::size_t i) {
    if (parts.size() != 9) fail_argument("parts", "9 tensors or None", std::to_string(parts.size()));
    return PyTuple_GET_ITEM(parts.ptr(), i);
  }
  static void expect_size(const Tensor& tensor, const char* name, std::int64_t size) {
    const std::int64_t has = tensor ? tensor.size(0) : 0;
    if (has < size) fail_argument(name, std::to_string(size) + " elements or more", std::to_string(has));
  }
};

inline Launch launch_of(const Plan& plan, const Job& job) {
  Launch launch{};
  launch.plan = plan;
  launch.memory = plan.memory();
  launch.jobs = 1;
  launch.slices = plan.slices;
  launch.job[0] = job;
  return launch;
}

// Runs launches: (launch, a tensor of theirs, those that have to be beside it).
using Runner = std::function<void(const Launch&, const Tensor&, std::initializer_list<const Tensor*>)>;

inline void forward(const Runner& run, const Plan& plan, py::handle gates_x_, py::handle weight_hh, py::handle carry,
                    py::handle states, py::handle reserve_, py::handle control, const py::tuple& parts,
                    const std::string& cell, bool reverse, std::int64_t first, std::int64_t count, std::int64_t base,
                    py::handle exchange, py::handle flags) {
  if (plan.backward) fail_argument("plan", "one of a forward pass", "one of a backward pass");
  const Tensor gates_x(gates_x_, "gates_x"), reserve(reserve_, "reserve", true);
  gates_x.expect({kAny, kAny, kAny});
  LoopArguments all(plan, weight_hh, carry, states, control, parts, cell, reverse, first, count, base, gates_x.size(0),
                    exchange, flags);
  const bool lstm = all.shape_.states == 2;
  if (reserve && lstm && all.states_.size(0) != 2) fail_argument("states", "two of them with reserve", "one");
  all.job_.gates_x = all.of_steps<const float>(gates_x, DType::kFloat32, all.shape_.gates * plan.hidden);
  all.job_.reserve = all.reserve(reserve);
  run(launch_of(plan, all.job_), gates_x,
      {&reserve, &all.weight_hh_, &all.carry_, &all.states_, &all.control_, &all.bias_ih_, &all.bias_hh_,
       &all.reset_state_, &all.peephole_, &all.recurrent_mask_, &all.zoneout_, &all.seed_, &all.exchange_,
       &all.flags_});
}

inline void backward(const Runner& run, const Plan& plan, py::handle weight_hh, py::handle carry,
                     const py::tuple& grads, const py::tuple& sums, py::handle states, py::handle reserve_,
                     py::handle gates_x_, py::handle product_, py::handle control, const py::tuple& parts,
                     const std::string& cell, bool reverse, std::int64_t first, std::int64_t count, std::int64_t base,
                     py::handle of_x_, py::handle of_u_, py::handle exchange, py::handle flags) {
  if (!plan.backward) fail_argument("plan", "one of a backward pass", "one of a forward pass");
  if (grads.size() != 3) fail_argument("grads", "3 tensors or None", std::to_string(grads.size()));
  if (sums.size() != 2) fail_argument("sums", "2 tensors or None", std::to_string(sums.size()));
  const Tensor of_x(of_x_, "of_x"), of_u(of_u_, "of_u", true), reserve(reserve_, "reserve", true);
  const Tensor gates_x(gates_x_, "gates_x", true), product(product_, "product", true);
  const auto item = [](const py::tuple& all, std::size_t i) { return py::handle(PyTuple_GET_ITEM(all.ptr(), i)); };
  const Tensor grad_hidden(item(grads, 0), "grad_hidden", true), grad_cells(item(grads, 1), "grad_cells", true);
  const Tensor grad_gates(item(grads, 2), "grad_gates", true);
  const Tensor sum_reset_state(item(sums, 0), "sum_reset_state", true),
      sum_peephole(item(sums, 1), "sum_peephole", true);
  of_x.expect({kAny, kAny, kAny});
  LoopArguments all(plan, weight_hh, carry, states, control, parts, cell, reverse, first, count, base, of_x.size(0),
                    exchange, flags);
  Job& job = all.job_;
  const std::int64_t H = plan.hidden, gates = all.shape_.gates;
  if (all.shape_.reserve > 0 && !reserve) fail_argument("reserve", "a tensor", "None");
  if (all.shape_.states == 2 && all.states_.size(0) != 2) fail_argument("states", "two of them", "one");
  if ((gates == 3) != static_cast<bool>(of_u)) fail_argument("of_u", gates == 3 ? "a tensor" : "None", "not that");
  if (gates == 1 && job.zoneout != nullptr && (!gates_x || !product)) {
    fail_argument("product", "a tensor, as gates_x, of an RNN with zoneout", "None");
  }
  job.grad_hidden = all.of_steps<const void>(grad_hidden, all.storage_, H);
  job.grad_cells = all.of_steps<const void>(grad_cells, all.storage_, H);
  grad_gates.expect({all.steps_, plan.batch, gates, H}).expect(all.storage_).expect_contiguous();
  job.grad_gates = grad_gates.data();
  job.gates_x = all.of_steps<const float>(gates_x, DType::kFloat32, gates * H);
  job.product = all.of_steps<const float>(product, DType::kFloat32, gates * H);
  job.of_x = all.of_steps<void>(of_x, all.storage_, gates * H);
  job.of_u = all.of_steps<void>(of_u, all.storage_, gates * H);
  job.sum_reset_state = all.sums(sum_reset_state, all.shape_.states);
  job.sum_peephole = all.sums(sum_peephole, 3);
  if (all.shape_.reserve > 0) job.reserve = all.reserve(reserve);
  run(launch_of(plan, job), of_x,
      {&of_u,         &reserve,         &gates_x,       &product,          &grad_hidden,   &grad_cells,
       &grad_gates,   &sum_reset_state, &sum_peephole,  &all.weight_hh_,   &all.carry_,    &all.states_,
       &all.control_, &all.bias_ih_,    &all.bias_hh_,  &all.reset_state_, &all.peephole_, &all.recurrent_mask_,
       &all.zoneout_, &all.seed_,       &all.exchange_, &all.flags_});
}

inline void bind_passes(py::module_& m, const Runner& run) {
  m.def(
      "recurrence_forward",
      [run](const Plan& plan, py::handle gates_x, py::handle weight_hh, py::handle carry, py::handle states,
            py::handle reserve, py::handle control, const py::tuple& parts, const std::string& cell, bool reverse,
            std::int64_t first, std::int64_t count, std::int64_t base, py::handle exchange, py::handle flags) {
        forward(run, plan, gates_x, weight_hh, carry, states, reserve, control, parts, cell, reverse, first, count,
                base, exchange, flags);
      },
      "Steps `first` and those that follow it: into states, reserve unless None, and carry.");
  m.def(
      "recurrence_backward",
      [run](const Plan& plan, py::handle weight_hh, py::handle carry, const py::tuple& grads, const py::tuple& sums,
            py::handle states, py::handle reserve, py::handle gates_x, py::handle product, py::handle control,
            const py::tuple& parts, const std::string& cell, bool reverse, std::int64_t first, std::int64_t count,
            std::int64_t base, py::handle of_x, py::handle of_u, py::handle exchange, py::handle flags) {
        backward(run, plan, weight_hh, carry, grads, sums, states, reserve, gates_x, product, control, parts, cell,
                 reverse, first, count, base, of_x, of_u, exchange, flags);
      },
      "Back through step `first` and those before it in the loop: into of_x, of_u, sums and carry.");
}

}  // namespace persistent_python
}  // namespace seqkernels
