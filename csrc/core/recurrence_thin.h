// The input part of the gates where a large weight meets few rows: one sequence of no more steps than a chunk has.
// Packing the weight would take as long as its product, so the input is packed instead, transposed, and the weight's
// rows are read where they are: gates^T = W x^T.
#pragma once

#include "core/gemm.h"
#include "core/recurrence.h"
#include "core/recurrence_pack.h"
#include "core/recurrence_team.h"

namespace seqkernels {
namespace {

// Weights up to this are packed in little time.
constexpr std::int64_t kThinBytes = 1 << 20;

// Asked of the whole sequence, so that a segment of it goes the same way.
inline bool is_thin(const Recurrence& p, int gates, std::int64_t element) {
  return p.project && p.batch == 1 && p.whole <= kChunkRows && gates * p.hidden * p.inputs * element > kThinBytes;
}

template <class T>
class ThinInput {
  static constexpr int n = kLanes<T>;
  static constexpr std::int64_t kPanel = kMaxVectors * n;  // steps of a panel

 public:
  // Elements of the packed input.
  static std::int64_t size(const Recurrence& p) { return ceil_div(p.steps, n) * n * p.inputs; }

  ThinInput(const Recurrence& p, T* packed) : p_(p), packed_(packed) {}

  // packed[panel][input][step], steps in the order of processing. All threads.
  void pack(int thread, int threads) const {
    const T* first = static_cast<const T*>(p_.input) + (p_.reverse ? p_.steps - 1 : 0) * p_.input_step;
    const Share panels = share(ceil_div(p_.steps, kPanel), thread, threads);
    for (std::int64_t k = panels.begin; k < panels.end; ++k) {
      pack_group<T>(first, p_.reverse ? -p_.input_step : p_.input_step, p_.inputs, p_.steps, 1, k * kPanel,
                    vectors(k * kPanel), packed_ + k * kPanel * p_.inputs);
    }
  }

  // gates[step][lane] = bias[lane] + the product for the lanes of units from `unit`, of gate `gate`; `stride` elements
  // from step to step. Lanes beyond H are those of the last unit.
  void multiply(int gate, std::int64_t unit, const T* bias, T* gates, std::int64_t stride) const {
    const T* rows[n];
    for (int i = 0; i < n; ++i) {
      const std::int64_t row = gate * p_.hidden + min_of(unit + i, p_.hidden - 1);
      rows[i] = static_cast<const T*>(p_.weight_ih) + row * p_.weight_ih_row;
    }
    alignas(64) T tile[n * kPanel];
    for (std::int64_t step = 0; step < p_.steps; step += kPanel) {
      product(n, p_.inputs, rows, packed_ + step * p_.inputs, vectors(step), false, tile, kPanel);
      for (int v = 0; v < vectors(step); ++v) {
        Vec<T> block[n];
        for (int i = 0; i < n; ++i) block[i] = load_full(tile + i * kPanel + v * n);
        transpose<T>(block);
        const std::int64_t count = min_of<std::int64_t>(n, p_.steps - step - v * n);
        for (std::int64_t i = 0; i < count; ++i) {
          store_full(gates + (step + v * n + i) * stride, block[i] + load_full(bias));
        }
      }
    }
  }

 private:
  int vectors(std::int64_t step) const {
    return static_cast<int>(min_of<std::int64_t>(kMaxVectors, ceil_div(p_.steps - step, n)));
  }

  const Recurrence& p_;
  T* const packed_;
};

}  // namespace
}  // namespace seqkernels
