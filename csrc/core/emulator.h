// A GPU of the host, for tests of persistent recurrences: warps take turns, their lanes are loops; flags are atomics, a
// cluster's barriers count as mbarrier does. Copies arrive as late as they may, and what is waited for has a place
// where a number that is none lies until then.
#pragma once

#include <atomic>
#include <exception>
#include <memory>
#include <mutex>
#include <vector>

#include "core/emulator_turns.h"
#include "core/persistent_backward.h"
#include "core/persistent_forward.h"

namespace seqkernels::persistent {
namespace {

// What a test of the tests leaves out: the order of memory of flags, synchronisations within a block.
struct LeftOut {
  bool release = false;
  bool sync = false;
};
inline LeftOut left_out;

// mbarrier with one arrival: a phase ends when the arrival and all bytes that it announced are there.
class Barrier {
 public:
  void expect(int bytes) {
    const std::lock_guard lock(mutex_);
    if (arrived_) fail_emulation("a barrier was armed twice in a phase");
    arrived_ = true;
    pending_ += bytes;
    end_phase();
  }
  void complete(int bytes) {
    const std::lock_guard lock(mutex_);
    pending_ -= bytes;
    if (pending_ < -(1 << 20)) fail_emulation("a barrier received more than it can count");
    end_phase();
  }
  void await(int parity) {
    std::unique_lock lock(mutex_);
    if (!ended_.wait(lock, [&] { return phase_ % 2 != parity; })) fail_emulation("a barrier waits for ever");
  }

 private:
  void end_phase() {
    if (!arrived_ || pending_ != 0) return;
    arrived_ = false;
    ++phase_;
    ended_.notify_all();
  }

  Mutex mutex_;
  Condition ended_;
  bool arrived_ = false;
  long pending_ = 0, phase_ = 0;
};

// What the warps of a block share.
class HostBlock {
 public:
  explicit HostBlock(int bytes) : memory_(static_cast<std::size_t>(bytes) + 16) {
    std::fill(memory_.begin(), memory_.end(), char(0xff));
  }

  char* shared(int offset) {
    const std::size_t from = reinterpret_cast<std::uintptr_t>(memory_.data()) % 16;
    return memory_.data() + (from == 0 ? 0 : 16 - from) + offset;
  }
  Barrier& barrier(int offset) { return barriers_[offset / 8]; }

 private:
  std::vector<char> memory_;
  Barrier barriers_[kSlots + kNorms];
};

// The blocks of a team, and where warps meet: those of a block, or all of them.
struct HostTeam {
  HostTeam(int blocks, int bytes) : all(blocks * kWarps) {
    for (int i = 0; i < blocks; ++i) {
      block.push_back(std::make_unique<HostBlock>(bytes));
      own.push_back(std::make_unique<Meeting>(kWarps));
    }
  }

  std::vector<std::unique_ptr<HostBlock>> block;
  std::vector<std::unique_ptr<Meeting>> own;
  Meeting all;
};

// A warp.
class HostWarp {
 public:
  static constexpr int kHere = 32;
  static int lane(int here) { return here; }

  template <class R>
  class OfWarp {
   public:
    R& operator[](int) { return *own_; }

   private:
    std::unique_ptr<R> own_ = std::make_unique<R>();
  };

  HostWarp(HostTeam& team, int rank, int warp)
      : team_(team), block_(*team.block[static_cast<std::size_t>(rank)]), rank_(rank), warp_(warp) {
    groups_.resize(32, std::vector<std::vector<Copy>>(1));
  }

  char* shared(int offset) { return block_.shared(offset); }
  template <class F>
  void each_thread(const F& f) {
    for (lane_ = 0; lane_ < 32; ++lane_) f(warp_ * 32 + lane_);
  }
  template <class F>
  void each_warp(const F& f) {
    f(warp_);
  }
  void sync() {
    if (!left_out.sync) meet();
  }
  void team_sync(Tier tier) {
    meet();
    if (tier == Tier::kCluster) team_.all.arrive_and_wait();
  }

  // Copies to shared memory, done when they are waited for; bytes behind the value become 0.
  void fetch(void* to, const void* from, int size) {
    std::memset(to, 0xff, 4);
    groups_[static_cast<std::size_t>(lane_)].back().push_back(
        {static_cast<char*>(to), static_cast<const char*>(from), size});
  }
  void end_fetch() { groups_[static_cast<std::size_t>(lane_)].emplace_back(); }
  void await_fetched(int pending) {
    auto& groups = groups_[static_cast<std::size_t>(lane_)];
    while (static_cast<int>(groups.size()) - 1 > pending) {
      for (const Copy& copy : groups.front()) {
        std::memset(copy.to, 0, 4);
        std::memcpy(copy.to, copy.from, static_cast<std::size_t>(copy.size));
      }
      groups.erase(groups.begin());
    }
  }

  void begin_barriers(int) {}
  void expect(int barrier, int bytes) { block_.barrier(barrier).expect(bytes); }
  void await(int barrier, int parity) { block_.barrier(barrier).await(parity); }
  void put16(int block, int offset, const void* from, int barrier) { put(block, offset, from, 16, barrier); }
  void put8(int block, int offset, const void* from, int barrier) { put(block, offset, from, 8, barrier); }

  static void publish(std::uint32_t* flag, std::uint32_t epoch) {
    const std::atomic_ref of(*flag);
    left_out.release ? of.store(epoch, std::memory_order_relaxed) : of.store(epoch, std::memory_order_release);
  }
  static void poll(const std::uint32_t* flag, std::uint32_t epoch) {
    const std::atomic_ref of(*const_cast<std::uint32_t*>(flag));
    if (!wait_until([&] { return of.load(std::memory_order_acquire) >= epoch; }))
      fail_emulation("a flag is waited for for ever");
  }

  static void load16(const void* from, std::uint32_t* to) { std::memcpy(to, from, 16); }
  static void load_fresh16(const void* from, std::uint32_t* to) { std::memcpy(to, from, 16); }
  static float load_fresh(const float* from) { return *from; }
  static void load_fresh8(const void* from, float* to) { std::memcpy(to, from, 8); }
  static void store16(void* to, const std::uint32_t* from) { std::memcpy(to, from, 16); }
  static void store8(void* to, const void* from) { std::memcpy(to, from, 8); }

  static void load_rows(const char* rows, int row, Operand<HostWarp>& to) {
    if (reinterpret_cast<std::uintptr_t>(rows) % 16 != 0 || row % 16 != 0) fail_emulation("rows are not aligned");
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) std::memcpy(&to.word[lane][i], rows + lane / 4 * row + i * 16 + lane % 4 * 4, 4);
    }
  }

  template <class E, class A>
  static void mma(Sum<HostWarp, E>& sum, const A& tile_of, const Operand<HostWarp>& b, int half) {
    using S = typename E::Storage;
    constexpr int kPerWord = 4 / sizeof(S), kColumns = kTileBytes / sizeof(S);
    float first[kTileRows][kColumns], second[8][kColumns];
    for (int lane = 0; lane < 32; ++lane) {
      const std::uint32_t* a = tile_of(lane);
      for (int r = 0; r < 4; ++r) {
        const Cut cut = cut_of(lane, r);
        S values[kPerWord];
        std::memcpy(values, &a[r], 4);
        for (int i = 0; i < kPerWord; ++i)
          first[cut.row][cut.byte / static_cast<int>(sizeof(S)) + i] = widen(values[i]);
      }
      for (int r = 0; r < 2; ++r) {
        S values[kPerWord];
        std::memcpy(values, &b.word[lane][2 * half + r], 4);
        const int column = (4 * (lane % 4) + 16 * r) / static_cast<int>(sizeof(S));
        for (int i = 0; i < kPerWord; ++i) second[lane / 4][column + i] = widen(values[i]);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + 8 * (i >> 1), column = 2 * (lane % 4) + (i & 1);
        float found = sum.value[lane][i];
        for (int k = 0; k < kColumns; ++k) found += multiplied<E>(first[row][k], second[column][k]);
        sum.value[lane][i] = found;
      }
    }
  }

  // What all lanes have together, in each of them.
  static void add(float (&x)[kHere]) {
    for (int apart = kHere / 2; apart > 0; apart /= 2) {
      for (int lane = 0; lane < apart; ++lane) x[lane] += x[lane + apart];
    }
    for (float& of_lane : x) of_lane = x[0];
  }

  // The lanes that share rows add up, and keep what tensor cores would have left them.
  template <class E>
  static void gather(Sum<HostWarp, E>& sum) {
    for (int quad = 0; quad < 32; quad += 4) {
      float all[16] = {};
      for (int q = 0; q < 4; ++q) {
        for (int i = 0; i < 16; ++i) all[i] += sum.value[quad + q][i];
      }
      for (int q = 0; q < 4; ++q) {
        for (int i = 0; i < 4; ++i) sum.value[quad + q][i] = all[8 * (i >> 1) + 2 * q + (i & 1)];
      }
    }
  }

 private:
  void meet() { team_.own[static_cast<std::size_t>(rank_)]->arrive_and_wait(); }

  struct Copy {
    char* to;
    const char* from;
    int size;
  };

  void put(int block, int offset, const void* from, int bytes, int barrier) {
    HostBlock& to = *team_.block[static_cast<std::size_t>(block)];
    std::memcpy(to.shared(offset), from, static_cast<std::size_t>(bytes));
    to.barrier(barrier).complete(bytes);
  }

  static float tf32(float x) {
    return bits_as<float>((bits_as<std::uint32_t>(x) + 0x1000u) & 0xffffe000u);  // to the nearest, ties away from 0
  }
  template <class E>
  static float multiplied(float a, float b) {
    if constexpr (E::kProduct != Product::kTf32x3) {
      return a * b;
    } else {
      const float a_high = tf32(a), b_high = tf32(b);
      return a_high * b_high + (a_high * tf32(b - b_high) + tf32(a - a_high) * b_high);
    }
  }

  HostTeam& team_;
  HostBlock& block_;
  const int rank_, warp_;
  std::vector<std::vector<std::vector<Copy>>> groups_;
  int lane_ = 0;
};

template <class Cell, class E>
void run_block(HostWarp& warp, const Launch& launch, const Place& place) {
  if (!launch.plan.backward) {
    Forward<HostWarp, Cell, E>(warp, launch, place).run();
  } else if (launch.plan.tall) {
    if constexpr (E::kProduct == Product::kExact) {
      fail_emulation("exact products have no tall tiles");
    } else {
      Backward<HostWarp, Cell, E, true>(warp, launch, place).run();
    }
  } else {
    Backward<HostWarp, Cell, E, false>(warp, launch, place).run();
  }
}

template <class Cell>
void run_product(HostWarp& warp, const Launch& launch, const Place& place) {
  switch (launch.plan.product) {
    case Product::kFloat16:
      return run_block<Cell, OfFloat16>(warp, launch, place);
    case Product::kBFloat16:
      return run_block<Cell, OfBFloat16>(warp, launch, place);
    case Product::kTf32x3:
      return run_block<Cell, OfTf32x3>(warp, launch, place);
    default:
      return run_block<Cell, OfExact>(warp, launch, place);
  }
}

// All blocks of a launch, a team at a time, whose warps do run(warp, launch, place). Throws what one of them threw.
template <class Run>
void emulate(const Launch& launch, const Run& run) {
  const int blocks = launch.plan.blocks;
  for (int first = 0; first < launch.jobs * launch.slices * blocks; first += blocks) {
    HostTeam team(blocks, launch.memory.total);
    std::vector<std::exception_ptr> errors(static_cast<std::size_t>(blocks * kWarps));
    take_turns(blocks * kWarps, [&](int i) {
      const int rank = i / kWarps;
      try {
        HostWarp warp(team, rank, i % kWarps);
        run(warp, launch, place_of(launch, first + rank));
      } catch (...) {
        errors[static_cast<std::size_t>(i)] = std::current_exception();
        team.own[static_cast<std::size_t>(rank)]->leave();
        team.all.leave();
      }
    });
    for (const std::exception_ptr& error : errors) {
      if (error) std::rethrow_exception(error);
    }
  }
}

}  // namespace
}  // namespace seqkernels::persistent
