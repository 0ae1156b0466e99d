// The thread team: OpenMP's threads (the runtime that torch has already loaded), a spin barrier for the steps of a
// recurrence, and the rule that says how many threads a piece of work is worth.
#pragma once

#include <omp.h>
#include <sched.h>

#include <cstdint>
#include <new>

#include "core/simd.h"

namespace seqkernels {
namespace {

// Work, in floating point operations, below which another thread costs more than it brings.
constexpr double kWorkPerThread = 4e5;  // of one call: starting a parallel region
constexpr double kWorkPerTurn = 4e4;    // between two barriers

inline int team_size(int threads, double work) {
  const double worth = work / kWorkPerThread;
  const int most = worth < threads ? static_cast<int>(worth) : threads;
  return most < 1 ? 1 : most;
}

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// All threads of a team meet here; none goes on before the last has come.
class Barrier {
 public:
  void wait(int threads) {
    if (threads == 1) return;
    const int turn = __atomic_load_n(&turn_, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&arrived_, 1, __ATOMIC_ACQ_REL) == threads) {
      __atomic_store_n(&arrived_, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&turn_, turn + 1, __ATOMIC_RELEASE);
      return;
    }
    for (int spins = 0; __atomic_load_n(&turn_, __ATOMIC_ACQUIRE) == turn; ++spins) {
      if (spins < 4000) {
        relax();
      } else {
        sched_yield();  // more threads than processors: let the others come
      }
    }
  }

 private:
  alignas(64) int arrived_ = 0;
  alignas(64) int turn_ = 0;
};

// Calls body(thread, threads) on each thread of a team of `threads`, or once as body(0, 1) where the runtime gives
// fewer: in a nested region, for example.
template <class Body>
inline void run_team(int threads, const Body& body) {
  if (threads <= 1) {
    body(0, 1);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    if (omp_get_num_threads() == threads) {
      body(omp_get_thread_num(), threads);
    } else if (omp_get_thread_num() == 0) {
      body(0, 1);
    }
  }
}

// The part of `count` items that falls to `thread`: [begin, end).
struct Share {
  std::int64_t begin, end;
};
inline Share share(std::int64_t count, int thread, int threads) {
  return {count * thread / threads, count * (thread + 1) / threads};
}

// Memory that the calls of one thread leave to its next ones: pages that are fresh from the system cost more than many
// a call. Holds at most kKept bytes.
class Pool {
 public:
  ~Pool() {
    for (Block& block : blocks_) ::operator delete(block.data, kAlignment);
  }

  // At least `bytes`, 64-byte aligned, and how many it is in fact. Throws std::bad_alloc.
  void* take(std::size_t& bytes) {
    Block* best = nullptr;
    for (Block& block : blocks_) {
      if (block.data == nullptr || block.bytes < bytes || block.bytes / 2 > bytes + kSlack) continue;
      if (best == nullptr || block.bytes < best->bytes) best = &block;
    }
    if (best == nullptr) return ::operator new(bytes, kAlignment);
    void* data = best->data;
    bytes = best->bytes;
    kept_ -= best->bytes;
    best->data = nullptr;
    return data;
  }

  void give(void* data, std::size_t bytes) {
    if (bytes > kKept) return ::operator delete(data, kAlignment);
    Block* free = nullptr;
    for (;;) {
      Block* oldest = nullptr;
      for (Block& block : blocks_) {
        if (block.data == nullptr) {
          free = &block;
        } else if (oldest == nullptr || block.age < oldest->age) {
          oldest = &block;
        }
      }
      if (free != nullptr && kept_ + bytes <= kKept) break;
      ::operator delete(oldest->data, kAlignment);
      kept_ -= oldest->bytes;
      oldest->data = nullptr;
    }
    *free = {data, bytes, ++given_};
    kept_ += bytes;
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  static constexpr std::size_t kKept = std::size_t{64} << 20, kSlack = 4096;
  static constexpr int kBlocks = 32;
  struct Block {
    void* data;
    std::size_t bytes, age;
  };
  Block blocks_[kBlocks] = {};
  std::size_t kept_ = 0, given_ = 0;
};

inline Pool& pool() {
  thread_local Pool instance;
  return instance;
}

// Scratch memory of one call, 64-byte aligned. Throws std::bad_alloc: to be created outside a team.
template <class T>
class Scratch {
 public:
  [[gnu::noinline]] explicit Scratch(std::int64_t count)
      : bytes_(max_of<std::size_t>(1, static_cast<std::size_t>(count) * sizeof(T))),
        data_(static_cast<T*>(pool().take(bytes_))) {}
  [[gnu::noinline]] ~Scratch() { pool().give(data_, bytes_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return data_; }

 private:
  std::size_t bytes_;
  T* data_;
};

}  // namespace
}  // namespace seqkernels
