// What both passes of the recurrence share: who does which part of a step, and the way to a cell and a storage type.
#pragma once

#include "core/cells.h"
#include "core/recurrence.h"
#include "core/team.h"

namespace seqkernels {
namespace {

// Weights above this do not stay in the cache beside each other: threads then share them out by columns.
constexpr std::int64_t kResidentBytes = 768 << 10;

struct Split {
  bool rows;  // threads own batch rows, else groups of hidden units
  int threads;
};

// Rows of input part that a thread makes at a time: enough for the weights to be worth their way into the cache.
constexpr std::int64_t kChunkRows = 128;

inline Split split_of(const Recurrence& p, int gates, std::int64_t groups, std::int64_t weight_bytes) {
  const double row = 2.0 * gates * p.hidden * p.batch, recurrent = row * p.hidden;
  const double entering = p.project ? row * p.inputs : 0;
  const int most = team_size(p.threads, (recurrent + entering) * static_cast<double>(p.whole));
  if (most == 1) return {true, 1};
  if (weight_bytes <= kResidentBytes && p.batch >= 4 * most) return {true, most};
  const int columns = static_cast<int>(min_of<double>(min_of<std::int64_t>(most, groups), recurrent / kWorkPerTurn));
  const int rows = static_cast<int>(min_of<std::int64_t>(most, p.batch));
  if (columns >= rows && columns > 1) return {false, columns};
  return {true, rows};
}

inline std::int64_t rows_of_thread(const Recurrence& p, const Split& split) {
  return split.rows ? ceil_div(p.batch, split.threads) : p.batch;
}

// Steps of a chunk.
inline std::int64_t chunk_of(const Recurrence& p, const Split& split) {
  const std::int64_t rows = max_of<std::int64_t>(1, rows_of_thread(p, split));
  return max_of<std::int64_t>(1, min_of(p.steps, kChunkRows / rows));
}

inline const std::uint8_t* control_of_step(const std::uint8_t* control, std::int64_t t, std::int64_t stride) {
  return control == nullptr ? nullptr : control + t * stride;
}

// Rows whose control byte has none of `bits` come first.
inline std::int64_t partition_rows(const std::uint8_t* control, std::int64_t stride, std::uint8_t bits, Share rows,
                                   std::int64_t* index) {
  std::int64_t active = 0, others = rows.end - rows.begin;
  for (std::int64_t b = rows.begin; b < rows.end; ++b) {
    if (control != nullptr && (control[b * stride] & bits)) {
      index[--others] = b;
    } else {
      index[active++] = b;
    }
  }
  return active;
}

// Ends of rows, out of line where they are long: a large part of the code and a small one of the time.
template <class E>
[[gnu::noinline]] Vec<Compute<E>> get_part(const E* from, std::int64_t left) {
  return load(from, left);
}
template <class E>
[[gnu::noinline]] void put_part(E* to, Vec<Compute<E>> x, std::int64_t left) {
  store(to, x, left);
}
#if defined(__AVX512F__)
template <class E>
constexpr bool kShortParts = sizeof(E) > 2;  // masks
#else
template <class E>
constexpr bool kShortParts = false;
#endif

// A vector of units, of which `left` are there: at least a full vector with kFull.
template <bool kFull, class E>
inline Vec<Compute<E>> get(const E* from, std::int64_t left) {
  if (kFull || left >= kLanes<Compute<E>>) return load(from);
  return kShortParts<E> ? load(from, left) : get_part(from, left);
}
template <bool kFull, class E>
inline void put(E* to, Vec<Compute<E>> x, std::int64_t left) {
  if (kFull || left >= kLanes<Compute<E>>) return store(to, x);
  kShortParts<E> ? store(to, x, left) : put_part(to, x, left);
}

template <template <template <class> class, class, bool, class> class Pass, class S, bool kOptions, class O,
          class Params>
void run_cell(const Params& p) {
  switch (p.cell) {
    case CellKind::kRnnTanh:
      return Pass<RnnTanh, S, kOptions, O>(p).run();
    case CellKind::kRnnRelu:
      return Pass<RnnRelu, S, kOptions, O>(p).run();
    case CellKind::kLstm:
      return Pass<Lstm, S, kOptions, O>(p).run();
    case CellKind::kGru:
      return Pass<Gru, S, kOptions, O>(p).run();
  }
}

// Without options a pass is compiled apart, for a twentieth more speed; not for processors before 2011.
#if defined(__x86_64__) && !defined(__AVX__)
constexpr bool kPlainApart = false;
#else
constexpr bool kPlainApart = true;
#endif

template <template <template <class> class, class, bool, class> class Pass, class S, bool kApart, class Params>
void run_options(const Params& p, bool options) {
  using O = Compute<S>;
  if constexpr (kApart && kPlainApart) {
    if (!options) return run_cell<Pass, S, false, O>(p);
  }
  run_cell<Pass, S, true, O>(p);
}

template <template <template <class> class, class, bool, class> class Pass, bool kApart, class Params>
void run_dtype(const Params& p, bool options) {
  switch (p.dtype) {
    case DType::kFloat32:
      return run_options<Pass, float, kApart>(p, options);
    case DType::kFloat64:
      return run_options<Pass, double, kApart>(p, options);
    case DType::kBFloat16:
      return run_options<Pass, BFloat16, kApart>(p, options);
    case DType::kFloat16:
      return run_options<Pass, Float16, kApart>(p, options);
  }
}

}  // namespace
}  // namespace seqkernels
