// How a recurrence is laid out over the blocks of a GPU that keep its weights for the whole sequence.
//
// A team of P blocks owns N rows of the batch; each of its blocks owns U hidden units, of all gates, and holds their
// weights as the stationary operand of tensor cores (the first one, whose 16 rows cost nothing where the batch has
// one).
//   Forward: the matrix (G*U, H) of a block, own rows by all units; what is exchanged is h, by all to all.
//   Backward: the same weights transposed, (H, G*U), all units by own rows; each block makes a part of the gradient of
//     every unit's h, which goes to the block that owns the unit and is summed there. That is half of what the exchange
//     of the gates' gradients would be, and no tile is longer than a block's own rows.
// Both are cut into tiles of 16 rows by 32 bytes, the fragments of mma; a warp holds tiles of `MR` rows of tiles by
// `KR` columns in registers, what is beyond in shared memory.
#pragma once

#include "core/portable.h"
#include "core/recurrence.h"

namespace seqkernels::persistent {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kTileRows = 16, kTileBytes = 32, kFragmentBytes = kTileRows * kTileBytes;
constexpr int kUnits = 8;       // rows of a tile that belong to one gate: units of a block come in so many
constexpr int kStateWords = 3;  // what a thread carries of an element: two states and the control of the step
constexpr int kSlots = 2;       // what is exchanged alternates between two places: nobody is ever two steps ahead
constexpr int kNorms = 2;       // layer norms that a step may have: of the product, of the cell state

// How the blocks of a team exchange what they make.
enum class Tier : int {
  kBlock,    // A: one block is a team
  kCluster,  // B: through the shared memory of a cluster
  kGrid,     // C: through memory, with flags
};

enum class Product : int { kFloat16, kBFloat16, kTf32x3, kExact };

SEQKERNELS_BOTH constexpr int bytes_of(Product product) {
  return product == Product::kFloat16 || product == Product::kBFloat16 ? 2 : 4;
}

SEQKERNELS_BOTH constexpr int gates_of(CellKind cell) {
  return cell == CellKind::kLstm ? 4 : cell == CellKind::kGru ? 3 : 1;
}
SEQKERNELS_BOTH constexpr int states_of(CellKind cell) { return cell == CellKind::kLstm ? 2 : 1; }

// The tiles in the registers of a warp: rows of tiles, columns of them.
struct Held {
  int rows, columns;
};
// Where the columns are few, in a backward pass with 16 units to a block, there are rows instead.
SEQKERNELS_BOTH constexpr Held held(CellKind cell, bool backward, bool tall) {
  if (!backward && cell == CellKind::kGru) return {3, 10};
  return tall ? Held{8, 4} : Held{4, 8};
}

// How the tiles of a block's matrix are dealt to its warps.
struct Split {
  int row_warps, column_warps;  // warps that share rows, that share columns
  int more;                     // rows of tiles that a warp has beyond those in its registers
  int columns;                  // of tiles that a warp has, even: two are loaded at once
};

struct Plan {
  Tier tier;
  CellKind cell;
  Product product;
  bool backward, tall;
  int hidden, batch;
  int blocks, units, rows;  // P, U, N
  int slices;               // teams, for all rows of the batch
  int stages;               // steps whose operands are on their way or in use
  bool norm_h, norm_c;      // layer norms in the middle of a step
  Split split;

  SEQKERNELS_BOTH int gates() const { return gates_of(cell); }
  SEQKERNELS_BOTH int bytes() const { return bytes_of(product); }
  SEQKERNELS_BOTH int tile_columns() const { return kTileBytes / bytes(); }
  SEQKERNELS_BOTH Held held_tiles() const { return held(cell, backward, tall); }
  SEQKERNELS_BOTH int padded() const { return blocks * units; }  // hidden units, with those that are not there
  SEQKERNELS_BOTH int norms() const { return int{norm_h} + int{norm_c}; }

  // Of the matrix of a block.
  SEQKERNELS_BOTH int matrix_rows() const { return backward ? padded() : gates() * units; }
  SEQKERNELS_BOTH int matrix_columns() const { return backward ? gates() * units : padded(); }
  SEQKERNELS_BOTH int tile_rows() const { return parts_of(matrix_rows(), kTileRows); }

  // Of the operand that moves, rows of the batch by columns of the matrix. 16 bytes more to each row, so that 8 rows
  // are in different banks.
  SEQKERNELS_BOTH int operand_row() const { return split.column_warps * split.columns * kTileBytes + 16; }
  SEQKERNELS_BOTH int operand_bytes() const { return rows * operand_row(); }

  // How often a warp does its product, and how many rows of tiles it has at a time.
  SEQKERNELS_BOTH int batches() const { return 1 + parts_of(split.more, held_tiles().rows); }
  SEQKERNELS_BOTH int batch_rows(int batch) const {
    const int rows = held_tiles().rows;
    return batch == 0 ? rows : least(split.more - (batch - 1) * rows, rows);
  }
  SEQKERNELS_BOTH int warps() const { return split.row_warps * split.column_warps; }

  // Tiles of a warp that are not in its registers.
  SEQKERNELS_BOTH int tail_tiles() const {
    const Held in_registers = held_tiles();
    return most(split.columns - in_registers.columns, 0) * in_registers.rows + split.more * split.columns;
  }

  // Sums that the cell takes: forward those of each gate and unit, `units` + 4 apart so that a fragment's four columns
  // meet no bank twice; backward those of each unit, rows of the batch beside each other, 2 apart.
  SEQKERNELS_BOTH int sums_row() const { return backward ? rows + 2 : units + 4; }
  SEQKERNELS_BOTH int sums_of_source() const { return backward ? units * sums_row() : gates() * rows * sums_row(); }
  // Where a grid exchanges them they are added up on their way in.
  SEQKERNELS_BOTH int sources() const {
    if (!backward) return split.column_warps;
    return tier == Tier::kGrid ? 1 : blocks * split.column_warps;
  }
  SEQKERNELS_BOTH int sums_slots() const { return backward && tier == Tier::kCluster ? kSlots : 1; }

  // Words of an element that a step reads from memory, fetched ahead.
  SEQKERNELS_BOTH int fetched() const {
    if (!backward) return gates() + 1;
    // With a norm, what it normalised and 1 over the deviation.
    const int of_norms = (norm_h ? gates() + 1 : 0) + (norm_c ? 2 : 0);
    return of_norms + (cell == CellKind::kLstm ? 8 : cell == CellKind::kGru ? 7 : 3);
  }
  // Words that a thread carries of an element from step to step: with norms of a backward pass, sums over the steps.
  SEQKERNELS_BOTH int state_words() const {
    return kStateWords + (backward ? (norm_h ? gates() : 0) + (norm_c ? 2 : 0) : 0);
  }
  SEQKERNELS_BOTH int row_threads() const { return kThreads / units; }            // rows that are worked on at once
  SEQKERNELS_BOTH int elements() const { return parts_of(rows, row_threads()); }  // of a thread

  // Where things are in shared memory, in bytes.
  struct Memory {
    int tail, operand, sums, fetched, state, bias, staging, barriers, gain, moments, parts, pairs, total;
  };
  SEQKERNELS_BOTH Memory memory() const {
    Memory m{};
    int at = 0;
    const auto place = [&at](int bytes) {
      const int here = at;
      at += round_up(bytes, 128);
      return here;
    };
    m.barriers = place((kSlots + kNorms) * 8);
    m.operand = place(kSlots * operand_bytes());
    m.sums = place(sums_slots() * sources() * sums_of_source() * 4);
    m.fetched = place(stages * fetched() * elements() * kThreads * 4);
    m.state = place(state_words() * elements() * kThreads * 4);
    m.bias = place(2 * gates() * units * 4);
    m.staging = place(backward || tier == Tier::kBlock ? 0 : rows * units * bytes());
    m.gain = place(((norm_h ? gates() : 0) + (norm_c ? 2 : 0)) * units * 4);
    m.moments = place(norms() > 0 ? 2 * rows * 4 : 0);
    m.parts = place(norms() > 0 && backward ? 2 * rows * units * 4 : 0);
    m.pairs = place(tier == Tier::kCluster ? pairs() * 8 : 0);
    m.tail = place(warps() * tail_tiles() * kFragmentBytes);
    m.total = at;
    return m;
  }

  // Pairs of numbers that the blocks of a team give each other for norms.
  SEQKERNELS_BOTH int pairs() const { return norms() == 0 ? 0 : kNorms * rows * blocks; }

  // Of one job, in memory: forward h of all units, backward the parts of the sums; the pairs behind them; and the flags
  // of the blocks.
  SEQKERNELS_BOTH std::int64_t exchange_bytes() const { return tier == Tier::kGrid ? sums_bytes() + pairs_bytes() : 0; }
  SEQKERNELS_BOTH std::int64_t sums_bytes() const {
    const std::int64_t parts = std::int64_t{blocks} * blocks * split.column_warps * units * rows * 4;
    return slices * kSlots * (backward ? parts : std::int64_t{rows} * padded() * bytes());
  }
  SEQKERNELS_BOTH std::int64_t pairs_bytes() const { return std::int64_t{slices} * pairs() * 8; }
  SEQKERNELS_BOTH int flags() const { return tier == Tier::kGrid ? slices * blocks : 0; }
};

// What of a device a plan depends on.
struct Device {
  int capability;     // 10 * major + minor
  int processors;     // multiprocessors
  int shared_memory;  // bytes that a block may have
  int cluster;        // blocks that a cluster may have; 0 for none
};

inline Split split_of(const Plan& plan) {
  const Held in_registers = plan.held_tiles();
  const int rows = plan.tile_rows(), columns = parts_of(plan.matrix_columns(), plan.tile_columns());
  Split split{};
  split.row_warps = least(parts_of(rows, in_registers.rows), kWarps);
  split.column_warps = most(least(kWarps / split.row_warps, parts_of(columns, 2)), 1);
  split.more = parts_of(most(rows - split.row_warps * in_registers.rows, 0), split.row_warps);
  split.columns = round_up(parts_of(columns, split.column_warps), 2);
  return split;
}

// The plan of a call with so many units to a block and rows to a team; `fits` says whether a device can have it.
inline Plan layout(Tier tier, CellKind cell, Product product, bool backward, int hidden, int batch, int units, int rows,
                   bool norm_h = false, bool norm_c = false) {
  Plan plan{};
  plan.tier = tier;
  plan.cell = cell;
  plan.product = product;
  plan.backward = backward;
  plan.hidden = hidden;
  plan.batch = batch;
  plan.units = units;
  plan.rows = rows;
  plan.norm_h = norm_h;
  plan.norm_c = norm_c;
  plan.blocks = parts_of(hidden, units);
  plan.slices = parts_of(batch, rows);
  plan.stages = 3;
  plan.tall = false;
  plan.split = split_of(plan);
  if (backward && product != Product::kExact) {
    Plan other = plan;
    other.tall = true;
    other.split = split_of(other);
    if (other.tail_tiles() < plan.tail_tiles()) plan = other;
  }
  while (plan.stages > 2 && plan.memory().total > 160 * 1024) --plan.stages;
  return plan;
}

inline bool fits(const Plan& plan, const Device& device) {
  if (plan.memory().total > device.shared_memory) return false;
  switch (plan.tier) {
    case Tier::kBlock:
      return plan.blocks == 1;
    case Tier::kCluster:
      return plan.blocks > 1 && plan.blocks <= device.cluster;
    default:
      return plan.blocks <= device.processors;
  }
}

}  // namespace seqkernels::persistent
