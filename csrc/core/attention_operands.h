// The rows of queries as operands of attention's backward pass, made once for all keys that a thread goes through.
#pragma once

#include "core/attention_scores.h"
#include "core/team.h"

namespace seqkernels {
namespace {

// A block of rows; what is not wanted is left as it is.
template <class T, class E>
struct OperandBlock {
  E* q;         // (rows, D) as the left operand
  E* grad_out;  // (rows, Dv) likewise
  // The same as right operands whose depth the rows are: copies only where they are pairs.
  E* q_depth;
  E* grad_out_depth;
  T* lse;      // (rows) 0 for -inf
  T* delta;    // (rows) of the output and its gradient
  T* of_lse;   // (rows) gradients of the log-sum-exp; apart, so that delta cancels to the last bit
  T* lengths;  // (rows) of q as vectors, NaN where the output or its gradient is not finite; where ALiBi needs them
};

// T computes, E is multiplied.
template <class T, class E>
class RowOperands {
  using V = Vec<T>;
  static constexpr int n = kLanes<T>;
  static constexpr bool kPairs = sizeof(E) == 2;

 public:
  // `blocks`: how many blocks of `row_space` rows a key head has at most; 0 if each is needed once. `of_scores`:
  // gradients that go through the scores are wanted.
  RowOperands(const AttentionBackward& p, const Scores<T>& scores, bool of_scores, std::int64_t row_space,
              std::int64_t blocks, int threads)
      : p_(p),
        scores_(scores),
        of_scores_(of_scores),
        row_space_(row_space),
        blocks_(blocks),
        size_ld_(round_up(p.head_size, n)),
        value_ld_(round_up(p.value_size, n)),
        ld_(kPairs ? padded_depth<E>(p.head_size) : size_ld_),
        grad_ld_(kPairs ? padded_depth<E>(p.value_size) : value_ld_),
        block_size_(round_up(row_space * (ld_ + grad_ld_ + (kPairs ? size_ld_ + value_ld_ : 0)), 64)),
        slots_(max_of<std::int64_t>(1, blocks)),
        operands_(threads * slots_ * block_size_),
        numbers_(threads * slots_ * 4 * row_space),
        made_(threads * blocks) {}

  std::int64_t ld() const { return ld_; }            // of q as the left operand
  std::int64_t grad_ld() const { return grad_ld_; }  // of grad_out

  // Another key head begins.
  void forget(int thread) { std::memset(made_.get() + thread * blocks_, 0, static_cast<std::size_t>(blocks_)); }

  OperandBlock<T, E> block(int thread, const Document& document, std::int64_t kv_head, std::int64_t index,
                           std::int64_t first, std::int64_t rows) {
    const std::int64_t slot = thread * slots_ + (blocks_ == 0 ? 0 : index);
    OperandBlock<T, E> b;
    b.q = operands_.get() + slot * block_size_;
    b.grad_out = b.q + row_space_ * ld_;
    b.q_depth = kPairs ? b.grad_out + row_space_ * grad_ld_ : b.q;
    b.grad_out_depth = kPairs ? b.q_depth + row_space_ * size_ld_ : b.grad_out;
    b.lse = numbers_.get() + slot * 4 * row_space_;
    b.delta = b.lse + row_space_;
    b.of_lse = b.delta + row_space_;
    b.lengths = b.of_lse + row_space_;
    if (blocks_ > 0) {
      std::uint8_t& made = made_.get()[thread * blocks_ + index];
      if (made) return b;
      made = 1;
    }
    make(b, document, kv_head, first, rows);
    return b;
  }

 private:
  void make(const OperandBlock<T, E>& b, const Document& document, std::int64_t kv_head, std::int64_t first,
            std::int64_t rows) const {
    const T* lse = static_cast<const T*>(p_.lse);
    const T* grad_lse = static_cast<const T*>(p_.grad_lse);
    for_heads(p_.heads / p_.kv_heads, document.queries, kv_head, first, rows,
              [&](std::int64_t head, std::int64_t query, std::int64_t at, std::int64_t count) {
                const auto row = [&](const Strided& x) {
                  return element(x.data, document.query_at(x.stride, head, query), p_.dtype);
                };
                read_left(p_.dtype, row(p_.q), p_.q.stride[2], count, p_.head_size, scores_.of_q(), b.q + at * ld_,
                          ld_);
                read_left(p_.dtype, row(p_.grad_out), p_.grad_out.stride[2], count, p_.value_size, T(1),
                          b.grad_out + at * grad_ld_, grad_ld_);
                const std::int64_t place = document.lse_at(p_, head, query);
                for (std::int64_t i = 0; i < count; ++i) {
                  b.lse[at + i] = lse[place + i] == -kInfinity<T> ? T(0) : lse[place + i];
                  b.of_lse[at + i] = grad_lse == nullptr ? T(0) : grad_lse[place + i];
                  b.delta[at + i] = T(0);
                }
                if (of_scores_) add_delta(row(p_.grad_out), row(p_.out), count, b.delta + at);
                if (scores_.fades()) measure(row(p_.q), row(p_.grad_out), row(p_.out), count, b.lengths + at);
              });
    if constexpr (kPairs) {
      // From the copies, which are contiguous over heads.
      pack_depth(p_.dtype, b.q, ld_, rows, p_.head_size, b.q_depth, size_ld_, false);
      pack_depth(p_.dtype, b.grad_out, grad_ld_, rows, p_.value_size, b.grad_out_depth, value_ld_, false);
    }
  }

  // The products of the rows of the output and its gradient.
  void add_delta(const void* grad, const void* out, std::int64_t rows, T* delta) const {
    with_storage<T>(p_.dtype, [&](auto tag) {
      const auto* g = static_cast<const decltype(tag)*>(grad);
      const auto* o = static_cast<const decltype(tag)*>(out);
      for (std::int64_t r = 0; r < rows; ++r, g += p_.grad_out.stride[2], o += p_.out.stride[2]) {
        V sum{};
        for (std::int64_t i = 0; i < p_.value_size; i += n) {
          sum += load(g + i, p_.value_size - i) * load(o + i, p_.value_size - i);
        }
        delta[r] = reduce_add<T>(sum);
      }
    });
  }

  void measure(const void* q, const void* grad, const void* out, std::int64_t rows, T* lengths) const {
    T others[2 * kLanes<float>];
    for (std::int64_t r = 0; r < rows; r += kLanes<float>) {
      const std::int64_t count = min_of<std::int64_t>(kLanes<float>, rows - r);
      const auto of = [&](const void* x, const Strided& like, std::int64_t size, T* to) {
        lengths_of<T>(p_.dtype, element(x, r * like.stride[2], p_.dtype), like.stride[2], count, size, to);
      };
      of(q, p_.q, p_.head_size, lengths + r);
      of(grad, p_.grad_out, p_.value_size, others);
      of(out, p_.out, p_.value_size, others + kLanes<float>);
      for (std::int64_t i = 0; i < count; ++i) lengths[r + i] += T(0) * (others[i] + others[kLanes<float> + i]);
    }
  }

  const AttentionBackward& p_;
  const Scores<T>& scores_;
  const bool of_scores_;
  const std::int64_t row_space_, blocks_, size_ld_, value_ld_, ld_, grad_ld_, block_size_, slots_;
  Scratch<E> operands_;
  Scratch<T> numbers_;
  Scratch<std::uint8_t> made_;
};

}  // namespace
}  // namespace seqkernels
