// What a block of a persistent recurrence does: parts that forward and backward pass share. The text of the kernels,
// and of their emulation: phases of threads and of warps, between which the machine M synchronises.
#pragma once

#include "core/persistent_element.h"
#include "core/persistent_product.h"

namespace seqkernels::persistent {
namespace {

// An element of a block that a thread works on: unit u of it, row n of its team; j and b are those of the layer.
struct Element {
  int u, n, index;
  int j;
  std::int64_t b;
  bool there;
};

template <class M, class Cell, class E, bool kBackward, bool kTall>
class Body : protected Elements<Cell, typename E::Storage, kBackward> {
  using Base = Elements<Cell, typename E::Storage, kBackward>;

 public:
  using Base::kGates, Base::kStates;
  using typename Base::S;
  static constexpr CellKind kCell = kGates == 4 ? CellKind::kLstm : kGates == 3 ? CellKind::kGru : CellKind::kRnnTanh;
  static constexpr Held kHeld = held(kCell, kBackward, kTall);
  using Registers = Weights<M, kHeld.rows, kHeld.columns>;

  SEQKERNELS_FN Body(M& m, const Launch& launch, const Place& place)
      : Base(launch.job[place.job], launch.plan.hidden, launch.plan.batch),
        m_(m),
        plan_(launch.plan),
        memory_(launch.memory),
        slice_(place.slice),
        rank_(place.rank) {}

 protected:
  using Base::job_, Base::value;

  SEQKERNELS_FN float* sums(int slot) const {
    const int each = plan_.sources() * plan_.sums_of_source();
    return reinterpret_cast<float*>(m_.shared(memory_.sums)) + (plan_.sums_slots() == 1 ? 0 : slot * each);
  }
  SEQKERNELS_FN char* operand(int slot) const { return m_.shared(memory_.operand) + slot * plan_.operand_bytes(); }
  SEQKERNELS_FN S& operand_at(int slot, int n, int column) const {
    return reinterpret_cast<S*>(operand(slot) + n * plan_.operand_row())[column];
  }
  SEQKERNELS_FN char* tail(int warp) const {
    return m_.shared(memory_.tail) + warp * plan_.tail_tiles() * kFragmentBytes;
  }
  SEQKERNELS_FN std::uint32_t& fetched(int stage, int field, int index, int thread) const {
    const int at = ((stage * plan_.fetched() + field) * plan_.elements() + index) * kThreads + thread;
    return reinterpret_cast<std::uint32_t*>(m_.shared(memory_.fetched))[at];
  }
  SEQKERNELS_FN float& state(int s, int index, int thread) const {
    return reinterpret_cast<float*>(m_.shared(memory_.state))[(s * plan_.elements() + index) * kThreads + thread];
  }
  SEQKERNELS_FN float& bias(int which, int gate, int unit) const {
    return reinterpret_cast<float*>(m_.shared(memory_.bias))[(which * kGates + gate) * plan_.units + unit];
  }

  // Calls f(element) for the elements of a thread, those of padding too.
  template <class F>
  SEQKERNELS_FN void each_element(int thread, const F& f) const {
    const int u = thread % plan_.units, together = plan_.row_threads();
    int n = thread / plan_.units;
    if (n >= together) return;
#pragma unroll 1
    for (int index = 0; n < plan_.rows; ++index, n += together) {
      const int j = rank_ * plan_.units + u;
      const std::int64_t b = static_cast<std::int64_t>(slice_) * plan_.rows + n;
      f(Element{u, n, index, j, b, j < plan_.hidden && b < plan_.batch});
    }
  }

  // A value fetched ahead: the word that holds it goes to shared memory, as copies have at least four bytes.
  template <class T>
  SEQKERNELS_FN void fetch(std::uint32_t& to, const T* from) const {
    if constexpr (sizeof(T) == 4) {
      m_.fetch(&to, from, 4);
    } else {
      const std::uintptr_t address = reinterpret_cast<std::uintptr_t>(from), word = address & ~std::uintptr_t{3};
      // No byte behind the value is read: it may be the tensor's last one.
      m_.fetch(&to, reinterpret_cast<const void*>(word), static_cast<int>(address - word + sizeof(T)));
    }
  }
  template <class T>
  SEQKERNELS_FN static T of_word(std::uint32_t word, const T* from) {
    if constexpr (sizeof(T) == 4) {
      return bits_as<T>(word);
    } else if constexpr (sizeof(T) == 2) {
      return bits_as<T>(static_cast<std::uint16_t>(word >> 8 * (reinterpret_cast<std::uintptr_t>(from) & 2)));
    } else {
      return static_cast<T>(word >> 8 * (reinterpret_cast<std::uintptr_t>(from) & 3));
    }
  }

  // Before the loop: shared memory without a number in it that is none, biases, barriers.
  SEQKERNELS_FN void begin() {
    m_.each_thread([&](int thread) {
      const int words = kSlots * plan_.operand_bytes() / 4;
      std::uint32_t* to = reinterpret_cast<std::uint32_t*>(operand(0));
      for (int i = thread; i < words; i += kThreads) to[i] = 0;
      for (int i = thread; i < kGates * plan_.units; i += kThreads) {
        const int gate = i / plan_.units, u = i % plan_.units, j = rank_ * plan_.units + u;
        const std::int64_t of = static_cast<std::int64_t>(gate) * plan_.hidden + j;
        const bool there = j < plan_.hidden;
        bias(0, gate, u) = there && job_.bias_ih != nullptr ? value(job_.bias_ih, of) : 0.0f;
        bias(1, gate, u) = there && job_.bias_hh != nullptr ? value(job_.bias_hh, of) : 0.0f;
      }
      if (thread == 0 && plan_.tier == Tier::kCluster) m_.begin_barriers(memory_.barriers);
    });
  }

  // What a slot of a cluster's exchange receives.
  SEQKERNELS_FN int received_bytes() const {
    if (kBackward) return plan_.sources() * plan_.units * plan_.rows * 4;
    return plan_.padded() * plan_.rows * static_cast<int>(sizeof(S));
  }
  SEQKERNELS_FN void expect(int slot) { m_.expect(memory_.barriers + slot * 8, received_bytes()); }

  // Waits for what all blocks of the team made for step `step` of the loop, 1 or later, in slot step % kSlots.
  SEQKERNELS_FN void receive(std::int64_t step, bool more) {
    const int slot = static_cast<int>(step % kSlots);
    if (plan_.tier == Tier::kCluster) {
      m_.each_thread([&](int thread) {
        m_.await(memory_.barriers + slot * 8, static_cast<int>((step - 1) / kSlots % 2));
        if (thread == 0 && more) expect(slot);
      });
    } else if (plan_.tier == Tier::kGrid) {
      poll(epoch(step));
    }
  }
  // Lets the others of a grid know that what this block made for step `step` is there.
  SEQKERNELS_FN void publish(std::int64_t step) { publish_epoch(epoch(step)); }

  // Flags count exchanges: the one at the end of a step, and those of the norms within it.
  SEQKERNELS_FN std::uint32_t epoch(std::int64_t step) const {
    return static_cast<std::uint32_t>(step * (1 + plan_.norms()));
  }
  SEQKERNELS_FN void poll(std::uint32_t epoch) {
    m_.each_thread([&](int thread) {
      const std::uint32_t* flags = job_.flags + slice_ * plan_.blocks;
      for (int block = thread; block < plan_.blocks; block += kThreads) m_.poll(flags + block, epoch);
    });
    m_.sync();
  }
  SEQKERNELS_FN void publish_epoch(std::uint32_t epoch) {
    m_.sync();
    m_.each_thread([&](int thread) {
      if (thread == 0) m_.publish(job_.flags + slice_ * plan_.blocks + rank_, epoch);
    });
  }

  M& m_;
  const Plan& plan_;
  const Plan::Memory& memory_;
  const int slice_, rank_;
};

}  // namespace
}  // namespace seqkernels::persistent
