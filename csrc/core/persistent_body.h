// What a block of a persistent recurrence does: parts that forward and backward pass share. The text of the kernels,
// and of their emulation: phases of threads and of warps, between which the machine M synchronises.
#pragma once

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
class Body {
 public:
  using S = typename E::Storage;
  static constexpr int kGates = Cell::kGates, kStates = Cell::kStates;
  static constexpr CellKind kCell = kGates == 4 ? CellKind::kLstm : kGates == 3 ? CellKind::kGru : CellKind::kRnnTanh;
  static constexpr Held kHeld = held(kCell, kBackward, kTall);
  using Registers = Weights<M, kHeld.rows, kHeld.columns>;

  SEQKERNELS_FN Body(M& m, const Launch& launch, const Place& place)
      : m_(m),
        plan_(launch.plan),
        memory_(launch.memory),
        job_(launch.job[place.job]),
        slice_(place.slice),
        rank_(place.rank) {}

 protected:
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

  SEQKERNELS_FN std::int64_t time_of(std::int64_t step) const {
    return job_.first + (job_.reverse != kBackward ? -step : step);
  }
  // Rows of the states before and after step t.
  SEQKERNELS_FN std::int64_t before(std::int64_t t) const { return t - job_.base + job_.reverse; }
  SEQKERNELS_FN std::int64_t after(std::int64_t t) const { return t - job_.base + 1 - job_.reverse; }
  SEQKERNELS_FN std::int64_t at(std::int64_t row, std::int64_t b, int j) const {
    return (row * plan_.batch + b) * plan_.hidden + j;
  }
  SEQKERNELS_FN std::int64_t at_gates(std::int64_t t, std::int64_t b, int j) const {
    return (t * plan_.batch + b) * kGates * plan_.hidden + j;
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

  SEQKERNELS_FN static float value(const void* data, std::int64_t at) { return widen(static_cast<const S*>(data)[at]); }

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

  SEQKERNELS_FN const std::uint8_t* control_at(std::int64_t t, std::int64_t b) const {
    return job_.control + t * plan_.batch + b;
  }

  SEQKERNELS_FN float fresh(int s, int j) const {
    return job_.reset_state == nullptr ? 0.0f
                                       : value(job_.reset_state, static_cast<std::int64_t>(s) * plan_.hidden + j);
  }

  // Calls f with the weights of c in i, f and o, or null. Two calls: a pointer that may be null would be one to memory.
  template <class F>
  SEQKERNELS_FN void with_peephole(int j, const F& f) const {
    if (kStates == 2 && job_.peephole != nullptr) {
      float weights[3];
#pragma unroll
      for (int k = 0; k < 3; ++k) weights[k] = value(job_.peephole, static_cast<std::int64_t>(k) * plan_.hidden + j);
      f(weights);
    } else {
      f(static_cast<const float*>(nullptr));
    }
  }

  // How much of state s stays what it was.
  SEQKERNELS_FN float kept(int s, std::int64_t t, const Element& x) const {
    const float probability = job_.zoneout[s];
    if (job_.seed == nullptr) return probability;
    const std::int64_t n = ((t * plan_.batch + x.b) * kStates + s) * plan_.hidden + x.j;
    return uniform(static_cast<std::uint64_t>(n), static_cast<std::uint64_t>(*job_.seed)) < probability ? 1.0f : 0.0f;
  }
  SEQKERNELS_FN static float mixed(float old, float made, float k) {
    return k == 0.0f ? made : k == 1.0f ? old : k * old + (1.0f - k) * made;
  }

  SEQKERNELS_FN void cell(const float* x, const float* h, const float* prev, float* next, float* saved,
                          const float* peep) const {
    if constexpr (kGates == 1) {
      job_.relu ? RnnRelu<float>::forward(x, h, prev, next, saved) : RnnTanh<float>::forward(x, h, prev, next, saved);
    } else {
      Cell::forward(x, h, prev, next, saved, peep);
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
      m_.each_thread([&](int thread) {
        const std::uint32_t* flags = job_.flags + slice_ * plan_.blocks;
        for (int block = thread; block < plan_.blocks; block += kThreads) {
          m_.poll(flags + block, static_cast<std::uint32_t>(step));
        }
      });
      m_.sync();
    }
  }
  // Lets the others of a grid know that what this block made for step `step` is there.
  SEQKERNELS_FN void publish(std::int64_t step) {
    m_.sync();
    m_.each_thread([&](int thread) {
      if (thread == 0) m_.publish(job_.flags + slice_ * plan_.blocks + rank_, static_cast<std::uint32_t>(step));
    });
  }

  M& m_;
  const Plan& plan_;
  const Plan::Memory& memory_;
  const Job& job_;
  const int slice_, rank_;
};

}  // namespace
}  // namespace seqkernels::persistent
