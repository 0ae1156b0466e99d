// Rounds of an exchange between blocks, timed: what all programs of this folder share.
//
// In a round each block makes `bytes` bytes and reads those of all blocks of its team. What it reads is compared with
// what it should be, and the next round begins when all of it was there, as the steps of a recurrence do.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

constexpr int kThreads = 256;
constexpr int kLong = 2200, kShort = 200;            // rounds of two launches, whose difference is timed
constexpr std::uint64_t kPatience = 10'000'000'000;  // nanoseconds until a block that waits ends the launch

class Watchdog {
 public:
  __device__ void check() {
    if (++polls_ % 1024 != 0) return;
    std::uint64_t now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    if (begin_ == 0) begin_ = now;
    if (now - begin_ > kPatience) __trap();
  }

 private:
  std::uint32_t polls_ = 0;
  std::uint64_t begin_ = 0;
};

// The word that a block makes in a round: never 0, nor all ones.
__device__ inline std::uint32_t word_of(int block, int round) {
  return static_cast<std::uint32_t>(round) * 1024u + static_cast<std::uint32_t>(block) + 1u;
}

// Of a launch: words that were wrong, and the cycles of the first block.
struct Outcome {
  unsigned long long wrong;
  long long cycles;
};

__device__ inline void tell(Outcome* outcome, unsigned long long wrong, long long begin) {
  if (wrong != 0) atomicAdd(&outcome->wrong, wrong);
  if (blockIdx.x == 0 && threadIdx.x == 0) outcome->cycles = clock64() - begin;
}

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

inline int attribute(cudaDeviceAttr which) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, 0), "cudaDeviceGetAttribute");
  return value;
}

// Prints a line of JSON for an exchange: medians of a round. `launch(rounds, outcome)` puts a launch on stream 0.
template <class F>
void time_rounds(const char* exchange, int teams, int blocks, int bytes, const F& launch) {
  Outcome* outcome = nullptr;
  Outcome found{};
  check(cudaMalloc(&outcome, sizeof(Outcome)), exchange);
  check(cudaMemset(outcome, 0, sizeof(Outcome)), exchange);
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), exchange);
  check(cudaEventCreate(&end), exchange);
  std::vector<double> nanoseconds, cycles;
  for (int repeat = -2; repeat < 9; ++repeat) {
    double took[2], clocks[2];
    for (int i = 0; i < 2; ++i) {
      check(cudaEventRecord(begin), exchange);
      launch(i == 0 ? kShort : kLong, outcome);
      check(cudaEventRecord(end), exchange);
      check(cudaEventSynchronize(end), exchange);
      float milliseconds = 0;
      check(cudaEventElapsedTime(&milliseconds, begin, end), exchange);
      took[i] = 1e6 * milliseconds;
      check(cudaMemcpy(&found, outcome, sizeof(Outcome), cudaMemcpyDeviceToHost), exchange);
      clocks[i] = static_cast<double>(found.cycles);
    }
    if (repeat < 0) continue;
    nanoseconds.push_back((took[1] - took[0]) / (kLong - kShort));
    cycles.push_back((clocks[1] - clocks[0]) / (kLong - kShort));
  }
  std::sort(nanoseconds.begin(), nanoseconds.end());
  std::sort(cycles.begin(), cycles.end());
  std::printf(
      "{\"exchange\": \"%s\", \"teams\": %d, \"blocks\": %d, \"bytes\": %d, \"ns\": %.1f, \"cycles\": %.0f, "
      "\"wrong\": %llu}\n",
      exchange, teams, blocks, bytes, nanoseconds[nanoseconds.size() / 2], cycles[cycles.size() / 2], found.wrong);
  std::fflush(stdout);
  check(cudaEventDestroy(begin), exchange);
  check(cudaEventDestroy(end), exchange);
  check(cudaFree(outcome), exchange);
}
