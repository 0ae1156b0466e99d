// What a persistent recurrence is given: pointers, and the steps. Shapes as in recurrence.h; float where not storage.
#pragma once

#include "core/persistent_plan.h"

namespace seqkernels::persistent {

// One loop over time. Several with one plan, directions of a layer for example, can be one launch.
struct Job {
  std::int64_t first, count;  // the first step in time, and how many follow it
  std::int64_t base;          // the step that row 0 of states and reserve is of
  bool reverse;               // whether the loop of the forward pass runs from T-1 to 0
  bool relu;                  // of an RNN

  const float* gates_x;         // (T, B, G*H); of a backward pass that of an RNN with zoneout
  const void* weight_hh;        // (G*H, H) storage
  float* carry;                 // (S, B, H): states, or their gradients, before the loop; after it, those that it made
  void* states;                 // (S or 1, n+1, B, H) storage
  std::int64_t state_plane;     // elements between h and c there; 0 where c is not stored
  float* reserve;               // (n, B, 4, H), or null
  const std::uint8_t* control;  // (T, B), or null
  // Options, storage unless said otherwise, null where not used.
  const void *bias_ih, *bias_hh;  // (G*H)
  const void* reset_state;        // (S, H)
  const void* peephole;           // (3, H)
  const void* recurrent_mask;     // (B, H)
  const void* norm_h;             // (G*H)
  const void* norm_c;             // (2, H)
  const float* zoneout;           // (S)
  const std::int64_t* seed;       // ()

  // Of a backward pass.
  const void *grad_hidden, *grad_cells;   // (T, B, H) storage, or null
  const void* grad_gates;                 // (T, B, G, H) storage, or null
  const float* product;                   // (n, B, G*H): the recurrent product, normalised, with norm_h; of an RNN
                                          // with zoneout, too
  const float* product_scale;             // (n, B), with norm_h: 1 over its deviation
  const float *cell_normal, *cell_scale;  // (n, B, H), (n, B), with norm_c: c normalised, 1 over its deviation
  void *of_x, *of_u;                      // (T, B, G*H) storage; of_u of a GRU alone
  void* of_product;                       // (T, B, G*H) storage, with norm_h
  float* sum_reset_state;                 // (S, B, H), or null
  float* sum_peephole;                    // (3, B, H), or null
  float *sum_norm_h, *sum_norm_c;         // (G, B, H), (2, B, H), or null

  // Of a grid: Plan::exchange_bytes() and Plan::flags(), the flags 0.
  void* exchange;
  std::uint32_t* flags;
};

constexpr int kMostJobs = 4;

struct Launch {
  Plan plan;
  Plan::Memory memory;
  int jobs;
  int first_slice, slices;  // of each job, in this launch
  Job job[kMostJobs];
};

// The place of a block: blocks of a team are neighbours, as a cluster's are.
struct Place {
  int job, slice, rank;
};
SEQKERNELS_BOTH Place place_of(const Launch& launch, int block) {
  const int team = block / launch.plan.blocks;
  return {team / launch.slices, launch.first_slice + team % launch.slices, block % launch.plan.blocks};
}

}  // namespace seqkernels::persistent
