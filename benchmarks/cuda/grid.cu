// A round through memory, between blocks of the whole device that are on it at once.
//
// * flags: each block stores its bytes and releases a flag; a warp acquires all flags, then all threads load.
// * grid_sync: cooperative groups' grid.sync() in place of the flags.
// * tagged: every word has the round beside it, and readers wait for words themselves: twice the bytes, no flag.
// * sentinel: words of a slot that was emptied before are waited for, until none is empty.
#include <cooperative_groups.h>

#include <cstring>

#include "rounds.cuh"

namespace {

constexpr int kSlots = 4;
constexpr std::uint32_t kEmpty = ~0u;

__device__ uint4 load_fresh(const uint4* from) {
  uint4 x;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(from)
               : "memory");
  return x;
}
__device__ uint4 load_relaxed(const uint4* from) {
  uint4 x;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(from)
               : "memory");
  return x;
}
__device__ void store_relaxed(uint4* to, std::uint32_t x) {
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %1, %1, %1};" ::"l"(to), "r"(x) : "memory");
}

__device__ bool differs(const uint4& x, std::uint32_t expected) {
  return x.x != expected || x.y != expected || x.z != expected || x.w != expected;
}

// What `load(i)` gives for each i below `all` of this thread, once `there` says so: several at once, as their latency
// is most of the time. `take(i, x)` has each.
template <class Load, class There, class Take>
__device__ void read_all(int all, const Load& load, const There& there, const Take& take) {
  constexpr int kBatch = 8;
  for (int first = static_cast<int>(threadIdx.x); first < all; first += kBatch * kThreads) {
    decltype(load(0)) x[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (first + j * kThreads < all) x[j] = load(first + j * kThreads);
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int i = first + j * kThreads;
      if (i >= all) break;
      Watchdog watchdog;
      while (!there(x[j])) {
        watchdog.check();
        x[j] = load(i);
      }
      take(i, x[j]);
    }
  }
}

// Of the kernels with vectors: slots (kSlots, blocks, vectors of 16 bytes). How many are not as they should be.
__device__ unsigned long long read_fresh(const uint4* slot, int vectors, int round) {
  unsigned long long wrong = 0;
  read_all(
      static_cast<int>(gridDim.x) * vectors, [&](int i) { return load_fresh(slot + i); },
      [](const uint4&) { return true; },
      [&](int i, const uint4& x) { wrong += differs(x, word_of(i / vectors, round)); });
  return wrong;
}

__global__ void __launch_bounds__(kThreads)
    flags(uint4* slots, std::uint32_t* flag, int vectors, int count, Outcome* outcome) {
  const int thread = static_cast<int>(threadIdx.x), rank = static_cast<int>(blockIdx.x),
            blocks = static_cast<int>(gridDim.x);
  unsigned long long wrong = 0;
  const long long begin = clock64();
  for (int round = 0; round < count; ++round) {
    uint4* slot = slots + round % kSlots * blocks * vectors;
    const std::uint32_t x = word_of(rank, round), epoch = static_cast<std::uint32_t>(round) + 1;
    for (int i = thread; i < vectors; i += kThreads) slot[rank * vectors + i] = make_uint4(x, x, x, x);
    __syncthreads();
    if (thread == 0) {
      asm volatile("fence.acq_rel.gpu;\nst.release.gpu.global.u32 [%0], %1;" ::"l"(flag + rank), "r"(epoch) : "memory");
    }
    if (thread < 32) {
      for (int block = thread; block < blocks; block += 32) {
        Watchdog watchdog;
        while (true) {
          std::uint32_t found;
          asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(found) : "l"(flag + block) : "memory");
          if (found >= epoch) break;
          watchdog.check();
        }
      }
    }
    __syncthreads();
    wrong += read_fresh(slot, vectors, round);
  }
  tell(outcome, wrong, begin);
}

__global__ void __launch_bounds__(kThreads)
    grid_sync(uint4* slots, std::uint32_t*, int vectors, int count, Outcome* outcome) {
  const int thread = static_cast<int>(threadIdx.x), rank = static_cast<int>(blockIdx.x),
            blocks = static_cast<int>(gridDim.x);
  unsigned long long wrong = 0;
  const long long begin = clock64();
  for (int round = 0; round < count; ++round) {
    uint4* slot = slots + round % kSlots * blocks * vectors;
    const std::uint32_t x = word_of(rank, round);
    for (int i = thread; i < vectors; i += kThreads) slot[rank * vectors + i] = make_uint4(x, x, x, x);
    cooperative_groups::this_grid().sync();
    wrong += read_fresh(slot, vectors, round);
  }
  tell(outcome, wrong, begin);
}

// Vectors of 16 bytes take two here: (word, round) pairs of 8 bytes, which are whole or not there.
__global__ void __launch_bounds__(kThreads)
    tagged(uint4* slots, std::uint32_t*, int vectors, int count, Outcome* outcome) {
  const int thread = static_cast<int>(threadIdx.x), rank = static_cast<int>(blockIdx.x),
            blocks = static_cast<int>(gridDim.x);
  auto* words = reinterpret_cast<std::uint64_t*>(slots);
  const int own = vectors * 4;
  unsigned long long wrong = 0;
  const long long begin = clock64();
  for (int round = 0; round < count; ++round) {
    std::uint64_t* slot = words + round % kSlots * blocks * own;
    const std::uint32_t tag = static_cast<std::uint32_t>(round) + 1;
    const std::uint64_t x = std::uint64_t{tag} << 32 | word_of(rank, round);
    for (int i = thread; i < own; i += kThreads) {
      asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(slot + rank * own + i), "l"(x) : "memory");
    }
    read_all(
        blocks * own,
        [&](int i) {
          std::uint64_t found;
          asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(found) : "l"(slot + i) : "memory");
          return found;
        },
        [&](std::uint64_t found) { return found >> 32 == tag; },
        [&](int i, std::uint64_t found) { wrong += static_cast<std::uint32_t>(found) != word_of(i / own, round); });
    __syncthreads();
  }
  tell(outcome, wrong, begin);
}

// The slots are empty at first. A block empties its part of the slot after the next one while it waits: all have read
// what was there two rounds ago, since they sent what it has of the last round.
__global__ void __launch_bounds__(kThreads)
    sentinel(uint4* slots, std::uint32_t*, int vectors, int count, Outcome* outcome) {
  const int thread = static_cast<int>(threadIdx.x), rank = static_cast<int>(blockIdx.x),
            blocks = static_cast<int>(gridDim.x);
  const int all = blocks * vectors;
  unsigned long long wrong = 0;
  const long long begin = clock64();
  for (int round = 0; round < count; ++round) {
    uint4* slot = slots + round % kSlots * all;
    uint4* later = slots + (round + 2) % kSlots * all;
    const std::uint32_t x = word_of(rank, round);
    for (int i = thread; i < vectors; i += kThreads) store_relaxed(slot + rank * vectors + i, x);
    for (int i = thread; i < vectors; i += kThreads) store_relaxed(later + rank * vectors + i, kEmpty);
    read_all(
        all, [&](int i) { return load_relaxed(slot + i); },
        [](const uint4& x) { return x.x != kEmpty && x.y != kEmpty && x.z != kEmpty && x.w != kEmpty; },
        [&](int i, const uint4& x) { wrong += differs(x, word_of(i / vectors, round)); });
    // What was emptied is seen to be so by all that see the words of the next round.
    asm volatile("fence.acq_rel.gpu;" ::: "memory");
    __syncthreads();
  }
  tell(outcome, wrong, begin);
}

}  // namespace

int main() {
  if (attribute(cudaDevAttrCooperativeLaunch) == 0) return 0;
  const int processors = attribute(cudaDevAttrMultiProcessorCount);
  using Kernel = void (*)(uint4*, std::uint32_t*, int, int, Outcome*);
  const struct {
    const char* name;
    Kernel kernel;
  } kinds[] = {{"flags", flags}, {"grid_sync", grid_sync}, {"tagged", tagged}, {"sentinel", sentinel}};
  for (int blocks : {8, 16, 32, 64, 128, 132}) {
    if (blocks > processors) continue;
    for (int bytes : {128, 512, 2048}) {
      const std::size_t size = std::size_t{2} * kSlots * static_cast<std::size_t>(blocks * bytes);
      uint4* slots = nullptr;
      std::uint32_t* flag = nullptr;
      check(cudaMalloc(&slots, size), "slots");
      check(cudaMalloc(&flag, static_cast<std::size_t>(blocks) * 4), "flags");
      for (const auto& kind : kinds) {
        const int first = std::strcmp(kind.name, "sentinel") == 0 ? 0xff : 0;
        time_rounds(kind.name, 1, blocks, bytes, [&](int count, Outcome* outcome) {
          check(cudaMemsetAsync(slots, first, size), kind.name);
          check(cudaMemsetAsync(flag, 0, static_cast<std::size_t>(blocks) * 4), kind.name);
          int vectors = bytes / 16;
          void* arguments[] = {&slots, &flag, &vectors, &count, &outcome};
          check(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kind.kernel), static_cast<unsigned>(blocks),
                                            kThreads, arguments, 0, nullptr),
                kind.name);
        });
      }
      check(cudaFree(slots), "slots");
      check(cudaFree(flag), "flags");
    }
  }
  return 0;
}
