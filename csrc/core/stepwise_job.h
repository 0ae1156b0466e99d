// What a recurrence of a launch or more for each step is given.
//
// A captured sequence of launches keeps the addresses that it was captured with. So what differs between calls lies
// behind one that does not: a `Space`, to which a call writes before its steps.
#pragma once

#include <initializer_list>

#include "core/persistent_job.h"

namespace seqkernels::stepwise {

using persistent::Job;
using persistent::Product;

constexpr int kWidth = 4;  // units of a thread

// What a call is, and where it has got to.
struct Space {
  Job job;
  bool vectors;           // as in Begin
  std::int64_t steps[2];  // the number of the coming step; a launch reads one of them and writes the other one
};

// Of every launch of a sequence, the same in all calls. `product` and `operand` are (B, G*H) and (B, H) forward, what
// h makes and h; (B, H) and (B, G*H) backward, what the gates' gradients make and those.
struct Step {
  Space* space;
  int turn;  // which of Space::steps is read: launches of a call take turns, 0 first
  int hidden, batch;
  const float* product;
  void* operand;
};

// What comes before the steps of a call.
struct Begin {
  Step step;
  Job job;
  bool backward;
  bool vectors;  // whether what a thread has of each tensor can be read at once
};

// Whether rows of all tensors of a call begin at multiples of what a thread has of them; `bytes` of an element of
// storage.
inline bool has_vectors(const Step& step, const Job& job, int bytes) {
  if (step.hidden % kWidth != 0) return false;
  std::uintptr_t floats = 0, stored = 0;
  for (const void* p : {static_cast<const void*>(job.gates_x), static_cast<const void*>(job.carry),
                        static_cast<const void*>(job.reserve), static_cast<const void*>(step.product)}) {
    floats |= reinterpret_cast<std::uintptr_t>(p);
  }
  for (const void* p : {static_cast<const void*>(job.states), job.bias_ih, job.bias_hh, job.grad_hidden, job.grad_cells,
                        job.grad_gates, static_cast<const void*>(job.of_x), static_cast<const void*>(job.of_u),
                        static_cast<const void*>(step.operand)}) {
    stored |= reinterpret_cast<std::uintptr_t>(p);
  }
  return floats % (kWidth * sizeof(float)) == 0 && stored % static_cast<std::uintptr_t>(kWidth * bytes) == 0;
}

}  // namespace seqkernels::stepwise
