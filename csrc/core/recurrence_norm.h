// What the layer norms of the forward pass saw, made again for a chunk of steps of the backward pass: all steps of the
// chunk are one product, and keeping it from the forward pass would double the reserve.
#pragma once

#include "core/gemm.h"
#include "core/recurrence_gradients.h"
#include "core/recurrence_options.h"
#include "core/recurrence_pack.h"

namespace seqkernels {
namespace {

template <class S, int kGates>
class Norms {
  using T = Compute<S>;
  static constexpr int n = kLanes<T>;
  static constexpr int kWidth = kMaxVectors * n;

 public:
  // For chunks of `steps` steps.
  Norms(const RecurrenceBackward& p, std::int64_t steps, int threads)
      : p_(p),
        steps_(steps),
        rows_(p.norm_h == nullptr ? 0 : steps * p.batch),
        panels_(ceil_div(kGates * p.hidden, kWidth)),
        packed_(p.norm_h == nullptr ? 0 : panels_ * p.hidden * kWidth),
        entering_(rows_ * p.hidden),
        normal_(rows_ * panels_ * kWidth),
        cells_(p.norm_c == nullptr ? 0 : threads * p.hidden),
        of_product_(rows_),
        of_cell_(p.norm_c == nullptr ? 0 : steps * p.batch),
        pointers_(rows_),
        means_(threads * p.batch) {
    for (std::int64_t r = 0; r < rows_; ++r) pointers_.get()[r] = entering_.get() + r * p.hidden;
  }

  // weight_hh as the recurrent product needs it. All threads, before the first chunk.
  void pack(int thread, int threads) {
    if (p_.norm_h == nullptr) return;
    const Share panels = share(panels_, thread, threads);
    for (std::int64_t k = panels.begin; k < panels.end; ++k) {
      pack_group(static_cast<const S*>(p_.weight_hh), p_.weight_hh_row, p_.hidden, kGates * p_.hidden, 1, k * kWidth,
                 kMaxVectors, packed_.get() + k * p_.hidden * kWidth);
    }
  }

  // Of the products in steps [begin, end), a chunk. All threads, which have done with the chunk before.
  void make_products(std::int64_t begin, std::int64_t end, int thread, int threads, Barrier& barrier) {
    const std::int64_t count = (end - begin) * p_.batch, H = p_.hidden;
    const Share rows = share(count, thread, threads);
    for (std::int64_t r = rows.begin; r < rows.end; ++r) enter(begin, r);
    barrier.wait(threads);
    const Share panels = share(panels_, thread, threads);
    for (std::int64_t k = panels.begin; k < panels.end; ++k) {
      product_to_norm(count, H, pointers_.get(), packed_.get() + k * H * kWidth, kMaxVectors,
                      normal_.get() + k * kWidth, panels_ * kWidth);
    }
    barrier.wait(threads);
    for (std::int64_t r = rows.begin; r < rows.end; ++r) {
      T* row = normal_.get() + r * panels_ * kWidth;
      const Moments<T> of_row = of_product_.get()[r] = moments(row, kGates * H);
      for (std::int64_t u = 0; u < panels_ * kWidth; u += n) {
        store_full(row + u, of_row.normal(load_full(row + u)));
      }
    }
    barrier.wait(threads);
  }

  // Of the cell states in steps [begin, end) of one chunk: `cells` and `reserve` are theirs, as of time 0.
  void make_cells(std::int64_t begin, std::int64_t end, const S* cells, const T* reserve, int thread, int threads,
                  Barrier& barrier) {
    const Share rows = share((end - begin) * p_.batch, thread, threads);
    T* made = cells_.get() + thread * p_.hidden;
    for (std::int64_t r = rows.begin; r < rows.end; ++r) {
      const std::int64_t i = begin + r / p_.batch, b = r % p_.batch;
      make_cells(time_of(p_, i), b, cells, reserve, made);
      of_cell_.get()[row(i, b)] = moments(made, p_.hidden);
    }
    barrier.wait(threads);
  }

  // The recurrent product of row b in step i, normalised (G*H).
  const T* normal(std::int64_t i, std::int64_t b) const { return normal_.get() + row(i, b) * panels_ * kWidth; }
  const Moments<T>& of_product(std::int64_t i, std::int64_t b) const { return of_product_.get()[row(i, b)]; }
  const Moments<T>& of_cell(std::int64_t i, std::int64_t b) const { return of_cell_.get()[row(i, b)]; }
  // (B) of a thread's own.
  NormMeans<T>* means(int thread) const { return means_.get() + thread * p_.batch; }

 private:
  std::int64_t row(std::int64_t i, std::int64_t b) const { return i % steps_ * p_.batch + b; }

  // The hidden state that entered the product.
  void enter(std::int64_t begin, std::int64_t r) {
    const std::int64_t b = r % p_.batch, H = p_.hidden;
    const S* before = state_before(p_, 0, time_of(p_, begin + r / p_.batch), b, static_cast<const S*>(p_.states));
    const S* mask = static_cast<const S*>(p_.recurrent_mask);
    T* to = entering_.get() + r * H;
    for (std::int64_t u = 0; u < H; u += n) {
      Vec<T> x = before == nullptr ? Vec<T>{} : get<false>(before + u, H - u);
      if (mask != nullptr) x *= get<false>(mask + b * H + u, H - u);
      put<false>(to + u, x, H - u);
    }
  }

  // c of an LSTM, before zoneout.
  void make_cells(std::int64_t t, std::int64_t b, const S* cells, const T* reserve, T* to) {
    const std::int64_t H = p_.hidden;
    const T* gates = reserve + (t * p_.batch + b) * Lstm<T>::kReserve * H;
    const S* before = state_before(p_, 1, t, b, cells);
    for (std::int64_t u = 0; u < H; u += n) {
      Vec<T> gate[3];
      for (int g = 0; g < 3; ++g) gate[g] = get<false>(gates + g * H + u, H - u);
      const Vec<T> prev = before == nullptr ? Vec<T>{} : get<false>(before + u, H - u);
      put<false>(to + u, Lstm<T>::cell_state(gate[0], gate[1], gate[2], prev), H - u);
    }
  }

  const RecurrenceBackward& p_;
  const std::int64_t steps_, rows_, panels_;
  Scratch<T> packed_, entering_, normal_, cells_;
  Scratch<Moments<T>> of_product_, of_cell_;
  Scratch<const T*> pointers_;
  Scratch<NormMeans<T>> means_;
};

}  // namespace
}  // namespace seqkernels
