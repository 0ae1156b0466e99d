// Persistent recurrences as Python calls them: of the module of CUDA kernels, and of the emulator of the tests.
#pragma once

#include <pybind11/stl.h>

#include <functional>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

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
                      std::int64_t hidden, std::int64_t batch, std::int64_t units, std::int64_t rows, bool norm_h,
                      bool norm_c) {
  if (units % kUnits != 0 || positive("units", units) > kThreads) {
    fail_argument("units", "a multiple of 8 up to 256", std::to_string(units));
  }
  if (rows % 8 != 0 || positive("rows", rows) > 64) {
    fail_argument("rows", "a multiple of 8 up to 64", std::to_string(rows));
  }
  if (positive("hidden", hidden) > 1 << 14) fail_argument("hidden", "a size up to 2^14", std::to_string(hidden));
  if (positive("batch", batch) > 1 << 24) fail_argument("batch", "a size up to 2^24", std::to_string(batch));
  const CellKind kind = cell_shape(cell).kind;
  if (norm_c && kind != CellKind::kLstm) fail_argument("norm_c", "False but for an LSTM", "True");
  const Plan plan = layout(tier_of(tier), kind, product_of(product), backward, static_cast<int>(hidden),
                           static_cast<int>(batch), static_cast<int>(units), static_cast<int>(rows), norm_h, norm_c);
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
      .def_property_readonly("norms", &Plan::norms, "Layer norms in a step.")
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
        py::arg("hidden"), py::arg("batch"), py::arg("units"), py::arg("rows"), py::arg("norm_h") = false,
        py::arg("norm_c") = false, "The plan of a call with given sizes, on no device yet.");
}

// Runs launches: (launch, a tensor of theirs, those that have to be beside it).
using Beside = std::vector<const Tensor*>;
using Runner = std::function<void(const Launch&, const Tensor&, const Beside&)>;

// The fields of seqkernels.backends._through_time.Parts, and with them those of a loop that both passes share.
class LoopArguments {
 public:
  // weight_hh, carry, states, control, parts, cell, reverse, first, count, base, exchange, flags
  using Given = std::tuple<py::handle, py::handle, py::handle, py::handle, py::tuple, std::string, bool, std::int64_t,
                           std::int64_t, std::int64_t, py::handle, py::handle>;

  LoopArguments(const Plan& plan, const Given& given, std::int64_t steps)
      : LoopArguments(plan, std::get<0>(given), std::get<1>(given), std::get<2>(given), std::get<3>(given),
                      std::get<4>(given), std::get<5>(given), std::get<6>(given), std::get<7>(given),
                      std::get<8>(given), std::get<9>(given), steps, std::get<10>(given), std::get<11>(given)) {}

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
        norm_h_(part(parts, 5), "norm_h", true),
        norm_c_(part(parts, 6), "norm_c", true),
        zoneout_(part(parts, 7), "zoneout", true),
        seed_(part(parts, 8), "seed", true),
        exchange_(exchange, "exchange", true),
        flags_(flags, "flags", true) {
    for (const auto& [tensor, planned, name] :
         {std::tuple(&norm_h_, plan.norm_h, "norm_h"), std::tuple(&norm_c_, plan.norm_c, "norm_c")}) {
      const bool given{*tensor};
      if (given != planned)
        fail_argument(name, planned ? "a tensor, as the plan has" : "None, as the plan has",
                      given ? "a tensor" : "None");
    }
    const std::int64_t H = plan.hidden, B = plan.batch, rows = shape_.gates * H, S = shape_.states;
    const bool same = gates_of(plan.cell) == shape_.gates;
    if (!same) fail_argument("cell", "that of the plan", "'" + cell + "'");
    weight_hh_.expect({rows, H}).expect(storage_).expect_contiguous();
    carry_.expect({S, B, H}).expect(DType::kFloat32).expect_contiguous();
    states_.expect({kAny, kAny, B, H}).expect(storage_).expect_last_contiguous();
    if (states_.stride(1) != B * H || states_.stride(2) != H)
      fail_argument("states", "steps behind one another", "others");
    control_.expect({steps, B}).expect_code(dlpack::kUInt, 8, "uint8").expect_contiguous();
    bias_ih_.expect({rows}).expect(storage_).expect_contiguous();
    bias_hh_.expect({rows}).expect(storage_).expect_contiguous();
    reset_state_.expect({S, H}).expect(storage_).expect_contiguous();
    peephole_.expect({3, H}).expect(storage_).expect_contiguous();
    recurrent_mask_.expect({B, H}).expect(storage_).expect_contiguous();
    norm_h_.expect({rows}).expect(storage_).expect_contiguous();
    norm_c_.expect({2, H}).expect(storage_).expect_contiguous();
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
    job_.norm_h = norm_h_.data();
    job_.norm_c = norm_c_.data();
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
    return of_shape(tensor, {here(), plan_.batch, shape_.reserve, plan_.hidden});
  }
  std::int64_t here() const { return states_.size(1) - 1; }  // steps that states has
  static float* of_shape(const Tensor& tensor, std::initializer_list<std::int64_t> shape) {
    tensor.expect(shape).expect(DType::kFloat32).expect_contiguous();
    return static_cast<float*>(tensor.data());
  }

  void add_to(Beside& beside) const {
    beside.insert(beside.end(),
                  {&weight_hh_, &carry_, &states_, &control_, &bias_ih_, &bias_hh_, &reset_state_, &peephole_,
                   &recurrent_mask_, &norm_h_, &norm_c_, &zoneout_, &seed_, &exchange_, &flags_});
  }

  const Plan& plan_;
  const CellShape shape_;
  const DType storage_;
  const std::int64_t steps_;
  Job job_{};
  Tensor weight_hh_, carry_, states_, control_, bias_ih_, bias_hh_, reset_state_, peephole_, recurrent_mask_, norm_h_,
      norm_c_, zoneout_, seed_, exchange_, flags_;

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

// A job of a forward pass.
class ForwardArguments {
 public:
  static constexpr bool kBackward = false;
  // what loops share, gates_x, reserve
  using Given = std::tuple<LoopArguments::Given, py::handle, py::handle>;

  ForwardArguments(const Plan& plan, const Given& given)
      : gates_x_(std::get<1>(given), "gates_x"),
        reserve_(std::get<2>(given), "reserve", true),
        loop_(plan, std::get<0>(given), gates_x_.expect({kAny, kAny, kAny}).size(0)) {
    const bool lstm = loop_.shape_.states == 2;
    if (reserve_ && lstm && loop_.states_.size(0) != 2) fail_argument("states", "two of them with reserve", "one");
    loop_.job_.gates_x = loop_.of_steps<const float>(gates_x_, DType::kFloat32, loop_.shape_.gates * plan.hidden);
    loop_.job_.reserve = loop_.reserve(reserve_);
  }

  const Job& job() const { return loop_.job_; }
  const Tensor& first() const { return gates_x_; }
  void add_to(Beside& beside) const {
    beside.insert(beside.end(), {&gates_x_, &reserve_});
    loop_.add_to(beside);
  }

 private:
  Tensor gates_x_, reserve_;
  LoopArguments loop_;
};

// A job of a backward pass.
class BackwardArguments {
 public:
  static constexpr bool kBackward = true;
  using Three = std::tuple<py::handle, py::handle, py::handle>;
  using Four = std::tuple<py::handle, py::handle, py::handle, py::handle>;
  // what loops share; gradients of hidden states, cell states and gates; sums of reset_state, peephole, norm_h and
  // norm_c; reserve, gates_x, product, of_x, of_u, of_product; product_scale, cell_normal, cell_scale
  using Given = std::tuple<LoopArguments::Given, Three, Four, py::handle, py::handle, py::handle, py::handle,
                           py::handle, py::handle, Three>;

  BackwardArguments(const Plan& plan, const Given& given)
      : grad_hidden_(std::get<0>(std::get<1>(given)), "grad_hidden", true),
        grad_cells_(std::get<1>(std::get<1>(given)), "grad_cells", true),
        grad_gates_(std::get<2>(std::get<1>(given)), "grad_gates", true),
        sum_reset_state_(std::get<0>(std::get<2>(given)), "sum_reset_state", true),
        sum_peephole_(std::get<1>(std::get<2>(given)), "sum_peephole", true),
        sum_norm_h_(std::get<2>(std::get<2>(given)), "sum_norm_h", true),
        sum_norm_c_(std::get<3>(std::get<2>(given)), "sum_norm_c", true),
        reserve_(std::get<3>(given), "reserve", true),
        gates_x_(std::get<4>(given), "gates_x", true),
        product_(std::get<5>(given), "product", true),
        of_x_(std::get<6>(given), "of_x"),
        of_u_(std::get<7>(given), "of_u", true),
        of_product_(std::get<8>(given), "of_product", true),
        product_scale_(std::get<0>(std::get<9>(given)), "product_scale", true),
        cell_normal_(std::get<1>(std::get<9>(given)), "cell_normal", true),
        cell_scale_(std::get<2>(std::get<9>(given)), "cell_scale", true),
        loop_(plan, std::get<0>(given), of_x_.expect({kAny, kAny, kAny}).size(0)) {
    Job& job = loop_.job_;
    const std::int64_t H = plan.hidden, gates = loop_.shape_.gates;
    if (loop_.shape_.reserve > 0 && !reserve_) fail_argument("reserve", "a tensor", "None");
    if (loop_.shape_.states == 2 && loop_.states_.size(0) != 2) fail_argument("states", "two of them", "one");
    if ((gates == 3) != static_cast<bool>(of_u_)) fail_argument("of_u", gates == 3 ? "a tensor" : "None", "not that");
    if (gates == 1 && job.zoneout != nullptr && (!gates_x_ || !product_)) {
      fail_argument("product", "a tensor, as gates_x, of an RNN with zoneout", "None");
    }
    if (plan.norm_h && (!product_ || !product_scale_ || !of_product_)) {
      fail_argument("product", "a tensor, as product_scale and of_product, with norm_h", "None");
    }
    if (plan.norm_c && (!cell_normal_ || !cell_scale_)) {
      fail_argument("cell_normal", "a tensor, as cell_scale, with norm_c", "None");
    }
    job.grad_hidden = loop_.of_steps<const void>(grad_hidden_, loop_.storage_, H);
    job.grad_cells = loop_.of_steps<const void>(grad_cells_, loop_.storage_, H);
    grad_gates_.expect({loop_.steps_, plan.batch, gates, H}).expect(loop_.storage_).expect_contiguous();
    job.grad_gates = grad_gates_.data();
    job.gates_x = loop_.of_steps<const float>(gates_x_, DType::kFloat32, gates * H);
    job.product = loop_.of_shape(product_, {loop_.here(), plan.batch, gates * H});
    job.product_scale = loop_.of_shape(product_scale_, {loop_.here(), plan.batch});
    job.cell_normal = loop_.of_shape(cell_normal_, {loop_.here(), plan.batch, H});
    job.cell_scale = loop_.of_shape(cell_scale_, {loop_.here(), plan.batch});
    job.of_x = loop_.of_steps<void>(of_x_, loop_.storage_, gates * H);
    job.of_u = loop_.of_steps<void>(of_u_, loop_.storage_, gates * H);
    job.sum_reset_state = loop_.sums(sum_reset_state_, loop_.shape_.states);
    job.of_product = loop_.of_steps<void>(of_product_, loop_.storage_, gates * H);
    job.sum_peephole = loop_.sums(sum_peephole_, 3);
    job.sum_norm_h = loop_.sums(sum_norm_h_, gates);
    job.sum_norm_c = loop_.sums(sum_norm_c_, 2);
    if (loop_.shape_.reserve > 0) job.reserve = loop_.reserve(reserve_);
  }

  const Job& job() const { return loop_.job_; }
  const Tensor& first() const { return of_x_; }
  void add_to(Beside& beside) const {
    beside.insert(beside.end(), {&of_x_, &of_u_, &reserve_, &gates_x_, &product_, &grad_hidden_, &grad_cells_,
                                 &grad_gates_, &sum_reset_state_, &sum_peephole_, &sum_norm_h_, &sum_norm_c_,
                                 &of_product_, &product_scale_, &cell_normal_, &cell_scale_});
    loop_.add_to(beside);
  }

 private:
  Tensor grad_hidden_, grad_cells_, grad_gates_, sum_reset_state_, sum_peephole_, sum_norm_h_, sum_norm_c_, reserve_,
      gates_x_, product_, of_x_, of_u_, of_product_, product_scale_, cell_normal_, cell_scale_;
  LoopArguments loop_;
};

// One launch of all jobs.
template <class Arguments>
void launch(const Runner& run, const Plan& plan, const py::tuple& jobs) {
  if (plan.backward != Arguments::kBackward) {
    const char* const kinds[] = {"one of a forward pass", "one of a backward pass"};
    fail_argument("plan", kinds[Arguments::kBackward], kinds[plan.backward]);
  }
  if (jobs.empty() || jobs.size() > kMostJobs) {
    fail_argument("jobs", "1 to " + std::to_string(kMostJobs), std::to_string(jobs.size()));
  }
  std::vector<std::unique_ptr<Arguments>> all;
  Launch launch{};
  launch.plan = plan;
  launch.memory = plan.memory();
  launch.slices = plan.slices;
  Beside beside;
  for (const py::handle job : jobs) {
    all.push_back(std::make_unique<Arguments>(plan, job.cast<typename Arguments::Given>()));
    launch.job[launch.jobs++] = all.back()->job();
    all.back()->add_to(beside);
  }
  run(launch, all.front()->first(), beside);
}

inline void bind_passes(py::module_& m, const Runner& run) {
  m.def(
      "recurrence_forward",
      [run](const Plan& plan, const py::args& jobs) { launch<ForwardArguments>(run, plan, jobs); }, py::arg("plan"),
      "A launch of jobs, of each of which step `first` and those that follow it: into states, reserve unless None, and "
      "carry.");
  m.def(
      "recurrence_backward",
      [run](const Plan& plan, const py::args& jobs) { launch<BackwardArguments>(run, plan, jobs); }, py::arg("plan"),
      "A launch of jobs, of each of which back through step `first` and those before it in the loop: into of_x, of_u, "
      "of_product, sums and carry.");
  m.attr("MOST_JOBS") = kMostJobs;
}

}  // namespace persistent_python
}  // namespace seqkernels
