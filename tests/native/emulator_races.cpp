// Persistent recurrences, emulated under ThreadSanitizer: both passes of some plans of each tier. Prints what ran.
#include <cstdio>
#include <string_view>

#include "core/emulator.h"

using namespace seqkernels;
using namespace seqkernels::persistent;

namespace {

constexpr int kBatch = 11;

// All memory of a call; what is read of it is a number.
struct Memory {
  Memory(const Plan& plan, int steps, int hidden)
      : floats(static_cast<std::size_t>(steps + 1) * kBatch * hidden * 5, 0.01f),
        weights(static_cast<std::size_t>(4 * hidden * hidden), 0.02f),
        states(floats),
        reserve(floats),
        of_x(floats),
        of_u(floats),
        of_product(floats),
        sums(floats),
        carry(static_cast<std::size_t>(2 * kBatch * hidden), 0.5f),
        control(static_cast<std::size_t>(steps) * kBatch, 0),
        exchange(static_cast<std::size_t>(plan.exchange_bytes()) / 4 + 4),
        flags(static_cast<std::size_t>(plan.flags()) + 1) {
    control[3] = kReset;
    control[5] = kHold;
  }

  std::vector<float> floats, weights, states, reserve, of_x, of_u, of_product, sums, carry;
  std::vector<std::uint8_t> control;
  std::vector<float> exchange;
  std::vector<std::uint32_t> flags;
};

void run(Tier tier, CellKind cell, bool backward, int hidden, int units, int rows, int steps, bool norm_h = false,
         bool norm_c = false) {
  const Plan plan = layout(tier, cell, Product::kExact, backward, hidden, kBatch, units, rows, norm_h, norm_c);
  Memory memory(plan, steps, hidden);
  Launch launch{};
  launch.plan = plan;
  launch.memory = plan.memory();
  launch.jobs = 1;
  launch.slices = plan.slices;
  Job& job = launch.job[0];
  job.first = backward ? steps - 1 : 0;
  job.count = steps;
  job.gates_x = memory.floats.data();
  job.weight_hh = memory.weights.data();
  job.carry = memory.carry.data();
  job.states = memory.states.data();
  job.state_plane = std::int64_t{steps + 1} * kBatch * hidden;
  job.reserve = memory.reserve.data();
  job.control = memory.control.data();
  job.grad_hidden = memory.floats.data();
  job.of_x = memory.of_x.data();
  job.of_u = cell == CellKind::kGru ? memory.of_u.data() : nullptr;
  job.norm_h = memory.floats.data();
  job.norm_c = memory.floats.data();
  job.product = memory.floats.data();
  job.product_scale = memory.floats.data();
  job.cell_normal = memory.floats.data();
  job.cell_scale = memory.floats.data();
  job.of_product = memory.of_product.data();
  job.sum_norm_h = memory.sums.data();
  job.exchange = memory.exchange.data();
  job.flags = memory.flags.data();
  emulate(launch, [](HostWarp& warp, const Launch& all, const Place& place) {
    all.plan.cell == CellKind::kLstm ? run_block<Lstm<float>, OfExact>(warp, all, place)
                                     : run_block<Gru<float>, OfExact>(warp, all, place);
  });
  std::printf("%d blocks of %d units, %d slices, %d steps, %d norms, %s\n", plan.blocks, units, plan.slices, steps,
              plan.norms(), backward ? "backward" : "forward");
}

}  // namespace

// Arguments: "norms" for a forward pass of one step alone, whose blocks exchange nothing but what its norms need;
// "without-release" and "without-sync" for what the emulator is to leave out.
int main(int count, char** arguments) {
  bool norms = false;
  for (int i = 1; i < count; ++i) {
    const std::string_view argument = arguments[i];
    if (argument == "norms") {
      norms = true;
    } else if (argument == "without-release") {
      left_out.release = true;
    } else if (argument == "without-sync") {
      left_out.sync = true;
    } else {
      std::fprintf(stderr, "no argument is called %s\n", arguments[i]);
      return 2;
    }
  }
  if (norms) {
    run(Tier::kGrid, CellKind::kLstm, false, 44, 24, 16, 1, true, true);
    return 0;
  }
  for (const bool backward : {false, true}) {
    for (const int steps : {1, 2, 5}) {
      for (const CellKind cell : {CellKind::kLstm, CellKind::kGru}) {
        run(Tier::kBlock, cell, backward, 44, 48, 8, steps);
        run(Tier::kCluster, cell, backward, 44, 16, 8, steps);
        run(Tier::kGrid, cell, backward, 44, 24, 16, steps);
      }
    }
    for (const int steps : {1, 4}) {
      run(Tier::kCluster, CellKind::kLstm, backward, 44, 16, 8, steps, true, true);
      run(Tier::kGrid, CellKind::kLstm, backward, 44, 24, 16, steps, true, true);
      run(Tier::kCluster, CellKind::kLstm, backward, 44, 16, 8, steps, false, true);
      run(Tier::kGrid, CellKind::kGru, backward, 44, 24, 16, steps, true);
    }
    run(Tier::kBlock, CellKind::kLstm, backward, 44, 48, 8, 4, true, true);
    // Warps here make parts for other blocks alone, and nobody waits for those but the block itself.
    run(Tier::kCluster, CellKind::kGru, backward, 130, 32, 8, 4);
  }
}
