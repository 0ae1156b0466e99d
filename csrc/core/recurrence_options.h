// What may be added to a cell, one vector of hidden units at a time, and the statistics of the layer norms. Both passes
// have a variant with options beside the plain one, which knows nothing of them.
#pragma once

#include "core/gemm.h"
#include "core/random.h"
#include "core/recurrence_team.h"

namespace seqkernels {
namespace {

inline bool has_options(const Recurrence& p) {
  return p.peephole != nullptr || p.recurrent_mask != nullptr || p.norm_h != nullptr || p.norm_c != nullptr ||
         p.zoneout != nullptr;
}
inline bool has_options(const RecurrenceBackward& p) {
  return has_options(static_cast<const Recurrence&>(p)) || p.grad_gates != nullptr;
}

// A where `kCondition` holds, else B.
template <bool kCondition, class A, class B>
struct ChooseType {
  using type = A;
};
template <class A, class B>
struct ChooseType<false, A, B> {
  using type = B;
};
template <bool kCondition, class A, class B>
using Choose = typename ChooseType<kCondition, A, B>::type;

// The place of members that only the variant with options has.
struct Nothing {
  template <class... Args>
  explicit Nothing(const Args&...) {}
};

template <class S, int kStates>
class Options {
  using T = Compute<S>;
  using V = Vec<T>;

 public:
  explicit Options(const Recurrence& p) : p_(p) {}

  bool masks() const { return p_.recurrent_mask != nullptr; }
  bool zones() const { return p_.zoneout != nullptr; }
  bool norms_product() const { return p_.norm_h != nullptr; }
  bool norms_cell() const { return kStates == 2 && p_.norm_c != nullptr; }

  // Weights of c in i, f and o, put into `to`; null where there are none.
  template <bool kFull>
  const V* peephole(std::int64_t unit, std::int64_t left, V* to) const {
    if (kStates != 2 || p_.peephole == nullptr) return nullptr;
    for (int k = 0; k < 3; ++k) to[k] = get<kFull>(static_cast<const S*>(p_.peephole) + k * p_.hidden + unit, left);
    return to;
  }

  // Factors of the hidden state, at = b * H + unit.
  template <bool kFull>
  V mask(std::int64_t at, std::int64_t left) const {
    return get<kFull>(static_cast<const S*>(p_.recurrent_mask) + at, left);
  }

  // How much of state `s` stays what it was: 0 or 1 at random, or the probability.
  V kept(int s, std::int64_t t, std::int64_t b, std::int64_t unit) const {
    const T probability = static_cast<T>(p_.zoneout[s]);
    if (p_.seed == nullptr) return splat(probability);
    const std::int64_t n = ((t * p_.batch + b) * kStates + s) * p_.hidden + unit;
    return uniform<T>(n, static_cast<std::uint64_t>(*p_.seed)) < probability ? splat(T(1)) : V{};
  }

  // State `s` after the step, of what it was and what the cell made of it.
  V zone_out(int s, std::int64_t t, std::int64_t b, std::int64_t unit, V old, V made) const {
    if (!zones()) return made;
    const V share = kept(s, t, b, unit);
    if (p_.seed == nullptr) return share * old + (T(1) - share) * made;
    return share != T(0) ? old : made;
  }

 private:
  const Recurrence& p_;
};

template <class T>
inline T total(Vec<T> x) {
  T sum = 0;
  for (int i = 0; i < kLanes<T>; ++i) sum += x[i];
  return sum;
}

// The first `count` lanes of x; the others are 0.
template <class T>
inline Vec<T> first_lanes(Vec<T> x, std::int64_t count) {
  if (count >= kLanes<T>) return x;
  T lanes[kLanes<T>];
  store_full(lanes, x);
  return load(lanes, count);
}

// What normalises a row: x -> (x - mean) * scale. The mean is in two parts, of which the first is an element: so where
// all elements are close to each other, nothing is lost in the difference, and equal ones leave exactly 0.
template <class T>
struct Moments {
  T first, mean, scale;

  Vec<T> normal(Vec<T> x) const { return (x - first - mean) * scale; }
};

template <class T>
inline Moments<T> moments(const T* row, std::int64_t count) {
  constexpr T kEpsilon = T(1e-5);
  const T first = row[0];
  if (count == 1) return {first, T(0), T(0)};  // nothing is left of one element, and nothing depends on it
  Vec<T> sum{}, squares{};
  for (std::int64_t i = 0; i < count; i += kLanes<T>) {
    sum += first_lanes<T>(get<false>(row + i, count - i) - first, count - i);
  }
  const T mean = total<T>(sum) / static_cast<T>(count);
  for (std::int64_t i = 0; i < count; i += kLanes<T>) {
    const Vec<T> x = first_lanes<T>(get<false>(row + i, count - i) - first - mean, count - i);
    squares += x * x;
  }
  const T variance = total<T>(squares) / static_cast<T>(count);
  return {first, mean, T(1) / static_cast<T>(__builtin_sqrt(variance + kEpsilon))};
}

// c = a b like product(), in sums of short sums: what a norm divides by a small deviation must be exact to rounding.
template <class T>
inline void product_to_norm(std::int64_t rows, std::int64_t depth, const T* const* a, const T* b, int vectors, T* c,
                            std::int64_t ldc) {
  constexpr int kBlock = 6 * kMaxRows, kDepth = 64;
  const T* at[kBlock];
  for (std::int64_t r = 0; r < rows; r += kBlock) {
    const std::int64_t count = min_of<std::int64_t>(kBlock, rows - r);
    for (std::int64_t k = 0; k < depth; k += kDepth) {
      for (std::int64_t m = 0; m < count; ++m) at[m] = a[r + m] + k;
      product(count, min_of<std::int64_t>(kDepth, depth - k), at, b + k * vectors * kLanes<T>, vectors, k > 0,
              c + r * ldc, ldc);
    }
  }
}

// Through y = normal * gain, normal = (x - mean) * scale, backwards: from the gradient dy of y to
//   dx = scale * (dy gain - mean(dy gain) - normal mean(dy gain normal)).
template <class T>
struct NormMeans {
  T gradient, product;
};

// The means, from the rows dy and dy * normal.
template <class S, class T>
inline NormMeans<T> norm_means(const T* grad, const T* grad_normal, const S* gain, std::int64_t count) {
  Vec<T> sum{}, sum_normal{};
  for (std::int64_t i = 0; i < count; i += kLanes<T>) {
    const Vec<T> factor = get<false>(gain + i, count - i);
    sum += get<false>(grad + i, count - i) * factor;
    sum_normal += get<false>(grad_normal + i, count - i) * factor;
  }
  return {total<T>(sum) / static_cast<T>(count), total<T>(sum_normal) / static_cast<T>(count)};
}

template <class T>
inline Vec<T> norm_backward(Vec<T> grad_times_gain, Vec<T> normal, T scale, const NormMeans<T>& means) {
  return scale * (grad_times_gain - means.gradient - normal * means.product);
}

// What the forward pass needs besides, with options.
template <class T>
struct ForwardBuffers {
  Scratch<T> operand;        // 2 of (B, H), of this step and the next: h * recurrent_mask
  Scratch<T> fresh_operand;  // (B, H): of rows after a reset
  Scratch<T> products;       // (B, G*H), for norm_h: the recurrent products of a step
  Scratch<T> seen;           // 2 of (B, H), for norm_c: c before zoneout, and o
  Scratch<Moments<T>> moments;

  ForwardBuffers(const RecurrenceForward& p, int gates, int threads)
      : operand(p.recurrent_mask == nullptr ? 0 : 2 * p.batch * p.hidden),
        fresh_operand(p.recurrent_mask == nullptr ? 0 : p.batch * p.hidden),
        products(p.norm_h == nullptr ? 0 : p.batch * gates * p.hidden),
        seen(p.norm_c == nullptr ? 0 : 2 * p.batch * p.hidden),
        moments(threads * p.batch) {}
};

}  // namespace
}  // namespace seqkernels
