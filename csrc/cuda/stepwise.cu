// The pass over the elements of a step. A row of the batch has a power of two of the threads of a block, so that no
// thread has to divide.
#include <string>

#include "core/stepwise.h"
#include "cuda/launch.h"
#include "cuda/stepwise.h"

namespace seqkernels::stepwise {
namespace {

constexpr int kThreads = 256, kMostLog = 8;

// Threads beside each other in a row of the batch, and blocks: those of the rows, those of a row.
struct Grid {
  int log_threads;
  dim3 blocks;
};

Grid grid_of(const Step& given) {
  const int units = parts_of(given.hidden, kWidth);
  int log = 0;
  while (log < kMostLog && 1 << log < units) ++log;
  // Fewer where the last block of a row would be nearly empty.
  while (log > 5 && round_up(units, 1 << log) > units + units / 8) --log;
  const int rows = kThreads >> log;
  return {log,
          dim3(static_cast<unsigned>(parts_of(given.batch, rows)), static_cast<unsigned>(parts_of(units, 1 << log)))};
}

struct Mine {
  std::int64_t b;
  int j;
  SEQKERNELS_FN explicit Mine(int log_threads) {
    const int thread = static_cast<int>(threadIdx.x);
    b = (static_cast<std::int64_t>(blockIdx.x) << (kMostLog - log_threads)) + (thread >> log_threads);
    j = ((static_cast<int>(blockIdx.y) << log_threads) + (thread & ((1 << log_threads) - 1))) * kWidth;
  }
  SEQKERNELS_FN static bool first() { return blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0; }
};

template <class S>
__global__ void __launch_bounds__(kThreads) begin_kernel(const __grid_constant__ Begin given, int log_threads) {
  const Mine mine(log_threads);
  if (Mine::first()) open(given);
  if (!given.backward && mine.b < given.step.batch && mine.j < given.step.hidden) Enter<S>(given).run(mine.b, mine.j);
}

// The space is two arguments: nobody writes the first part of it, which may be read as what does not change.
template <class Cell, class S, bool kBackward>
__global__ void __launch_bounds__(kThreads, 2)
    step_kernel(const __grid_constant__ Step given, const Space* __restrict__ space, std::int64_t* steps,
                int log_threads) {
  const Mine mine(log_threads);
  const typename PassOf<Cell, S, kBackward>::Type pass(space->job, space->vectors, steps, given);
  if (Mine::first()) pass.advance(steps);
  if (mine.b < given.batch && mine.j < given.hidden) pass.run(mine.b, mine.j);
}

using StepKernel = void (*)(Step, const Space*, std::int64_t*, int);

StepKernel kernel_of(CellKind cell, Product product, bool backward) {
  StepKernel found = nullptr;
  with_types(cell, product, [&](auto of_cell, auto storage) {
    using Cell = decltype(of_cell);
    using S = decltype(storage);
    found = backward ? &step_kernel<Cell, S, true> : &step_kernel<Cell, S, false>;
  });
  return found;
}

std::string name_of(CellKind cell, Product product, bool backward) {
  static const char* const cells[] = {"rnn", "rnn", "lstm", "gru"};
  static const char* const storages[] = {"float16", "bfloat16", "float32", "float32"};
  return std::string(cells[static_cast<int>(cell)]) + (backward ? "_backward_" : "_forward_") + "step_" +
         storages[static_cast<int>(product)];
}

}  // namespace

void begin(Product product, const Begin& given, cudaStream_t stream) {
  Grid grid = grid_of(given.step);
  if (given.backward) grid.blocks = dim3(1);
  with_storage(product, [&](auto storage) {
    begin_kernel<decltype(storage)><<<grid.blocks, kThreads, 0, stream>>>(given, grid.log_threads);
  });
  cuda::check_launch("begin_of_steps");
}

void step(CellKind cell, Product product, bool backward, const Step& given, cudaStream_t stream) {
  const Grid grid = grid_of(given);
  kernel_of(cell, product, backward)<<<grid.blocks, kThreads, 0, stream>>>(given, given.space, given.space->steps,
                                                                           grid.log_threads);
  cuda::check_launch(name_of(cell, product, backward).c_str());
}

void prepare(CellKind cell, Product product, bool backward) {
  cudaFuncAttributes found{};
  cuda::check(cudaFuncGetAttributes(&found, kernel_of(cell, product, backward)),
              name_of(cell, product, backward).c_str());
}

}  // namespace seqkernels::stepwise
