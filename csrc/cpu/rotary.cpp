// Pairs of elements of each row turned by angles of their own:
//
//   out_a = a cos - b sin,  out_b = b cos + a sin
//
// in one pass over x, which takes little more than a copy. Rows are visited in the order in which they lie in memory.
// Going through all heads with a few positions, whose cosines and sines then stay in the first cache, is slower: the
// processor fetches one long stream ahead better than many short ones.
#include "core/kernels.h"
#include "core/simd.h"
#include "core/team.h"

namespace seqkernels {
namespace {

constexpr double kWorkPerElement = 16;  // floating point operations that take as long as one element

template <class S>
class Rotation {
  using T = Compute<S>;
  using V = Vec<T>;
  static constexpr int n = kLanes<T>;

 public:
  explicit Rotation(const Rotary& p) : p_(p), sign_(p.inverse ? T(-1) : T(1)) {
    // Slowest dimension first; sizes of 1 are no matter.
    for (int i = 1; i < 3; ++i) {
      for (int j = i; j > 0 && step(order_[j]) > step(order_[j - 1]); --j) {
        const int other = order_[j];
        order_[j] = order_[j - 1];
        order_[j - 1] = other;
      }
    }
    for (int i = 0; i < n; ++i) {
      even_[i] = 2 * i;
      odd_[i] = 2 * i + 1;
      low_[i] = i / 2 + (i % 2) * n;
      high_[i] = n / 2 + low_[i];
    }
  }

  void run() const {
    const std::int64_t inner = p_.sizes[order_[2]], middle = p_.sizes[order_[1]];
    const std::int64_t all = p_.sizes[order_[0]] * middle * inner;
    const double work = kWorkPerElement * static_cast<double>(all) * static_cast<double>(p_.size);
    run_team(team_size(p_.threads, work), [&](int thread, int threads) {
      const Share mine = share(all, thread, threads);
      for (std::int64_t row = mine.begin; row < mine.end;) {
        std::int64_t place[3];
        place[order_[0]] = row / inner / middle;
        place[order_[1]] = row / inner % middle;
        place[order_[2]] = row % inner;
        const std::int64_t count = min_of(inner - row % inner, mine.end - row);
        rows(place, count);
        row += count;
      }
    });
  }

 private:
  std::int64_t step(int dim) const { return p_.sizes[dim] == 1 ? INT64_MAX : p_.out.stride[dim]; }

  template <class Tensor>
  std::int64_t offset(const Tensor& tensor, const std::int64_t* place) const {
    return place[0] * tensor.stride[0] + place[1] * tensor.stride[1] + place[2] * tensor.stride[2];
  }

  void rows(const std::int64_t* place, std::int64_t count) const {
    const int along = order_[2];
    const S* x = static_cast<const S*>(p_.x.data) + offset(p_.x, place);
    const T* cos = static_cast<const T*>(p_.cos.data) + offset(p_.cos, place);
    const T* sin = static_cast<const T*>(p_.sin.data) + offset(p_.sin, place);
    S* out = static_cast<S*>(p_.out.data) + offset(p_.out, place);
    const std::int64_t rest = p_.size - 2 * p_.pairs;
    for (std::int64_t r = 0; r < count; ++r) {
      if (p_.interleaved) {
        neighbours(x, cos, sin, out);
      } else {
        halves(x, cos, sin, out);
      }
      if (rest > 0) std::memcpy(out + 2 * p_.pairs, x + 2 * p_.pairs, static_cast<std::size_t>(rest) * sizeof(S));
      x += p_.x.stride[along];
      cos += p_.cos.stride[along];
      sin += p_.sin.stride[along];
      out += p_.out.stride[along];
    }
  }

  void halves(const S* x, const T* cos, const T* sin, S* out) const {
    const std::int64_t pairs = p_.pairs;
    for (std::int64_t j = 0; j < pairs; j += n) {
      const std::int64_t left = pairs - j;
      const V a = load(x + j, left), b = load(x + pairs + j, left);
      const V c = load(cos + j, left), s = load(sin + j, left) * sign_;
      store(out + j, a * c - b * s, left);
      store(out + pairs + j, b * c + a * s, left);
    }
  }

  void neighbours(const S* x, const T* cos, const T* sin, S* out) const {
    for (std::int64_t j = 0; j < p_.pairs; j += n) {
      const std::int64_t left = p_.pairs - j;
      const bool both = 2 * left > n;
      const V first = load(x + 2 * j, 2 * left), second = both ? load(x + 2 * j + n, 2 * left - n) : V{};
      const V a = __builtin_shuffle(first, second, even_), b = __builtin_shuffle(first, second, odd_);
      const V c = load(cos + j, left), s = load(sin + j, left) * sign_;
      const V u = a * c - b * s, v = b * c + a * s;
      store(out + 2 * j, __builtin_shuffle(u, v, low_), 2 * left);
      if (both) store(out + 2 * j + n, __builtin_shuffle(u, v, high_), 2 * left - n);
    }
  }

  const Rotary& p_;
  const T sign_;
  int order_[3] = {0, 1, 2};
  IntVec<T> even_, odd_, low_, high_;
};

}  // namespace

void SEQKERNELS_ENTRY(rotary)(const Rotary& p) {
  if (p.sizes[0] * p.sizes[1] * p.sizes[2] * p.size == 0) return;
  switch (p.dtype) {
    case DType::kFloat32:
      return Rotation<float>(p).run();
    case DType::kFloat64:
      return Rotation<double>(p).run();
    case DType::kBFloat16:
      return Rotation<BFloat16>(p).run();
    case DType::kFloat16:
      return Rotation<Float16>(p).run();
  }
}

}  // namespace seqkernels
