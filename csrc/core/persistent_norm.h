// Layer norms of a persistent recurrence, in the middle of a step. They need sums over all units of a row, of which a
// block has its own: each block gives all blocks of its team two numbers of each row, and joins those of all blocks,
// always in the same order. Forward these are the mean and the squared distances to it, so that nothing cancels;
// backward, two sums.
//
// A pair has one place, of its norm, its row and its block: two slots are not needed. A block gives the pairs of step
// t + 1 after it has received what all blocks exchange at the end of step t, h or parts of gradients; that a block
// sends behind a synchronisation which follows its last look at the pairs of step t. So a barrier of a cluster has been
// seen by all threads, and armed again, before a byte of its next phase arrives, too.
#pragma once

#include "core/persistent_body.h"

namespace seqkernels::persistent {
namespace {

constexpr float kNormEpsilon = 1e-5f;
constexpr int kOfProduct = 0, kOfCell = 1;  // the norms

template <class M, class Cell, class E, bool kBackward, bool kTall>
class Normed : protected Body<M, Cell, E, kBackward, kTall> {
 public:
  using Base = Body<M, Cell, E, kBackward, kTall>;
  using Base::Base;

 protected:
  using Base::job_, Base::kGates, Base::m_, Base::memory_, Base::plan_, Base::rank_, Base::slice_;

  // Two numbers of a row of the batch, in each lane of the warp that works on it.
  struct Pair {
    float first[M::kHere], second[M::kHere];
  };

  SEQKERNELS_FN float* floats(int offset) const { return reinterpret_cast<float*>(m_.shared(offset)); }
  // What the elements of row n need: forward mean and 1 over the deviation, backward the means of a gradient and of its
  // product with what was normalised.
  SEQKERNELS_FN float* moments(int n) const { return floats(memory_.moments) + 2 * n; }
  // Backward, the parts of an element in the sums of its row.
  SEQKERNELS_FN float& part(int which, int n, int u) const {
    return floats(memory_.parts)[(which * plan_.rows + n) * plan_.units + u];
  }
  SEQKERNELS_FN float& gain_h(int gate, int u) const { return floats(memory_.gain)[gate * plan_.units + u]; }
  // Gain and bias of the norm of c.
  SEQKERNELS_FN float& gain_c(int which, int u) const {
    return floats(memory_.gain)[((plan_.norm_h ? kGates : 0) + which) * plan_.units + u];
  }

  // Before the loop.
  SEQKERNELS_FN void begin_norms() {
    m_.each_thread([&](int thread) {
      for (int i = thread; i < plan_.units; i += kThreads) {
        const int j = rank_ * plan_.units + i;
        const bool there = j < plan_.hidden;
        const auto of = [&](const void* gains, int row) {
          return there ? Base::value(gains, static_cast<std::int64_t>(row) * plan_.hidden + j) : 0.0f;
        };
        for (int g = 0; plan_.norm_h && g < kGates; ++g) gain_h(g, i) = of(job_.norm_h, g);
        for (int k = 0; plan_.norm_c && k < 2; ++k) gain_c(k, i) = of(job_.norm_c, k);
      }
    });
  }
  // By the thread that arms barriers.
  SEQKERNELS_FN void expect_pairs(int norm) { m_.expect(barrier(norm), plan_.rows * plan_.blocks * 8); }
  SEQKERNELS_FN void expect_first_pairs() {
    if (plan_.norm_h) expect_pairs(kOfProduct);
    if (plan_.norm_c) expect_pairs(kOfCell);
  }

  // Forward: mean and deviation of each row's values of all blocks, value(n, gate, u) of this one.
  template <class Value>
  SEQKERNELS_FN void find_moments(int norm, std::int64_t step, int gates, const Value& value) {
    const float share = 1.0f / static_cast<float>(gates * plan_.hidden);
    through_team(
        norm, step, gates,
        [&](int n, Pair& pair) { own_moments(gates, [&](int g, int u) { return value(n, g, u); }, pair); },
        [&](int n, int here, const Pair& pair) {
          moments(n)[0] = pair.first[here];
          moments(n)[1] = inverse_root(pair.second[here] * share + kNormEpsilon);
        });
  }

  // Backward: means over each row's elements of all blocks of what part() has of this one.
  SEQKERNELS_FN void join_parts(int norm, std::int64_t step, int gates) {
    const float share = 1.0f / static_cast<float>(gates * plan_.hidden);
    through_team(
        norm, step, gates,
        [&](int n, Pair& pair) {
          for (int here = 0; here < M::kHere; ++here) {
            float first = 0.0f, second = 0.0f;
#pragma unroll 1
            for (int u = M::lane(here); u < plan_.units; u += 32) {
              first += part(0, n, u);
              second += part(1, n, u);
            }
            pair.first[here] = first;
            pair.second[here] = second;
          }
          M::add(pair.first);
          M::add(pair.second);
        },
        [&](int n, int here, const Pair& pair) {
          moments(n)[0] = pair.first[here] * share;
          moments(n)[1] = pair.second[here] * share;
        });
  }

 private:
  // Units of a block that are there.
  SEQKERNELS_FN int units_of(int block) const { return least(plan_.units, plan_.hidden - block * plan_.units); }

  SEQKERNELS_FN int barrier(int norm) const { return memory_.barriers + (kSlots + norm) * 8; }
  SEQKERNELS_FN int place(int norm, int n, int block) const { return (norm * plan_.rows + n) * plan_.blocks + block; }
  // In memory.
  SEQKERNELS_FN float* exchanged_pair(int norm, int n, int block) const {
    float* pairs = reinterpret_cast<float*>(static_cast<char*>(job_.exchange) + plan_.sums_bytes());
    return pairs + 2 * (static_cast<std::int64_t>(slice_) * plan_.pairs() + place(norm, n, block));
  }

  // Calls own(n, pair) for the rows of a warp, and, when those of all blocks are joined, use(n, here, pair) in one
  // lane. Begins where all threads have synchronised after they wrote what own() reads, and ends so after use().
  template <class Own, class Use>
  SEQKERNELS_FN void through_team(int norm, std::int64_t step, int gates, const Own& own, const Use& use) {
    const bool alone = plan_.tier == Tier::kBlock;
    m_.each_warp([&](int warp) {
#pragma unroll 1
      for (int n = warp; n < plan_.rows; n += kWarps) {
        Pair pair;
        own(n, pair);
        if (alone) {
          in_one_lane(n, pair, use);
        } else {
          give(norm, n, pair);
        }
      }
    });
    if (!alone) {
      receive_pairs(norm, step);
      m_.each_warp([&](int warp) {
#pragma unroll 1
        for (int n = warp; n < plan_.rows; n += kWarps) {
          Pair pair;
          join(norm, n, gates, pair);
          in_one_lane(n, pair, use);
        }
      });
    }
    m_.sync();
  }

  template <class Use>
  SEQKERNELS_FN static void in_one_lane(int n, const Pair& pair, const Use& use) {
    for (int here = 0; here < M::kHere; ++here) {
      if (M::lane(here) == 0) use(n, here, pair);
    }
  }

  SEQKERNELS_FN void give(int norm, int n, const Pair& pair) {
    for (int here = 0; here < M::kHere; ++here) {
      const float both[2] = {pair.first[here], pair.second[here]};
      if (plan_.tier == Tier::kCluster) {
#pragma unroll 1
        for (int block = M::lane(here); block < plan_.blocks; block += 32) {
          m_.put8(block, memory_.pairs + place(norm, n, rank_) * 8, both, barrier(norm));
        }
      } else if (M::lane(here) == 0) {
        M::store8(exchanged_pair(norm, n, rank_), both);
      }
    }
  }

  SEQKERNELS_FN void receive_pairs(int norm, std::int64_t step) {
    if (plan_.tier == Tier::kCluster) {
      m_.each_thread([&](int thread) {
        m_.await(barrier(norm), static_cast<int>(step % 2));
        if (thread == 0 && step + 1 < job_.count) expect_pairs(norm);
      });
    } else {
      // Forward the product is normalised first, backward last.
      const bool second = plan_.norms() == 2 && (norm == kOfProduct) == kBackward;
      const std::uint32_t now = this->epoch(step) + (second ? 2 : 1);
      this->publish_epoch(now);
      this->poll(now);
    }
  }

  SEQKERNELS_FN void pair_of(int norm, int n, int block, float (&pair)[2]) const {
    if (plan_.tier == Tier::kCluster) {
      const float* at = floats(memory_.pairs) + 2 * place(norm, n, block);
      pair[0] = at[0];
      pair[1] = at[1];
    } else {
      M::load_fresh8(exchanged_pair(norm, n, block), pair);
    }
  }

  // The pairs of row n of all blocks.
  SEQKERNELS_FN void join(int norm, int n, int gates, Pair& pair) const {
    float count[M::kHere], sum[M::kHere];
    for (int here = 0; here < M::kHere; ++here) {
      float first = 0.0f, second = 0.0f, seen = 0.0f;
#pragma unroll 2
      for (int block = M::lane(here); block < plan_.blocks; block += 32) {
        float given[2];
        pair_of(norm, n, block, given);
        if (kBackward) {
          first += given[0];
          second += given[1];
        } else {
          const float more = static_cast<float>(gates * units_of(block)), share = more / (seen + more);
          const float apart = given[0] - first;
          first += apart * share;
          second += given[1] + apart * apart * (seen * share);
          seen += more;
        }
      }
      pair.first[here] = first;
      pair.second[here] = second;
      count[here] = seen;
      sum[here] = seen * first;
    }
    if (kBackward) {
      M::add(pair.first);
    } else {
      M::add(sum);
      for (int here = 0; here < M::kHere; ++here) {
        const float mean = sum[here] / static_cast<float>(gates * plan_.hidden), apart = pair.first[here] - mean;
        pair.second[here] += count[here] * apart * apart;
        pair.first[here] = mean;
      }
    }
    M::add(pair.second);
  }

  // Mean and squared distances of a row's values of this block, value(gate, u).
  template <class Value>
  SEQKERNELS_FN void own_moments(int gates, const Value& value, Pair& pair) const {
    const int units = units_of(rank_);
    const float count = static_cast<float>(gates * units);
    for (int here = 0; here < M::kHere; ++here) {
      float sum = 0.0f;
#pragma unroll 1
      for (int g = 0; g < gates; ++g) {
#pragma unroll 1
        for (int u = M::lane(here); u < units; u += 32) sum += value(g, u);
      }
      pair.first[here] = sum;
    }
    M::add(pair.first);
    for (int here = 0; here < M::kHere; ++here) {
      const float mean = pair.first[here] / count;
      float squares = 0.0f;
#pragma unroll 1
      for (int g = 0; g < gates; ++g) {
#pragma unroll 1
        for (int u = M::lane(here); u < units; u += 32) {
          const float apart = value(g, u) - mean;
          squares += apart * apart;
        }
      }
      pair.first[here] = mean;
      pair.second[here] = squares;
    }
    M::add(pair.second);
  }
};

}  // namespace
}  // namespace seqkernels::persistent
