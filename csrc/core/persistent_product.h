// The product of a warp: tiles of weights, which stay, by rows of the batch, which move.
//
// A machine M is what runs it. On a GPU a thread runs the text, M::kHere is 1; in the emulation a warp does, whose 32
// lanes are the innermost loops. Fragments are those of mma.m16n8k16 (16-bit) and m16n8k8 (tf32), which are the same in
// bytes: lane l = 4 g + q has bytes [4 q, 4 q + 4) and the same 16 bytes further of rows g and g + 8 of the first
// factor, and of row g of the second one, which is stored transposed; of the result columns 2 q and 2 q + 1 of rows g
// and g + 8.
#pragma once

#ifndef SEQKERNELS_SCALAR
#define SEQKERNELS_SCALAR
#endif
#include "core/cells.h"
#include "core/persistent_job.h"

namespace seqkernels::persistent {
namespace {

// Kinds of products: the dtype in memory.
struct OfFloat16 {
  using Storage = Float16;
  static constexpr Product kProduct = Product::kFloat16;
};
struct OfBFloat16 {
  using Storage = BFloat16;
  static constexpr Product kProduct = Product::kBFloat16;
};
struct OfTf32x3 {  // three products of the parts of each factor
  using Storage = float;
  static constexpr Product kProduct = Product::kTf32x3;
};
struct OfExact {
  using Storage = float;
  static constexpr Product kProduct = Product::kExact;
};

// Where register `r` of a lane is in its tile.
struct Cut {
  int row, byte;
};
SEQKERNELS_FN Cut cut_of(int lane, int r) { return {lane / 4 + 8 * (r & 1), 4 * (lane % 4) + 16 * (r >> 1)}; }

// Eight rows of a block's matrix in the forward pass: their gate and their first unit, within the block. Units go by
// eights, gates of the same units behind one another, so that whole tiles are full whatever the number of gates.
struct OwnRows {
  int gate, unit;
};
SEQKERNELS_FN OwnRows own_rows(const Plan& plan, int eight) {
  return {eight % plan.gates(), eight / plan.gates() * kUnits};
}

// Eight rows in the backward pass: the block that they belong to, and their first unit there.
struct SentRows {
  int block, unit;
};
SEQKERNELS_FN SentRows sent_rows(const Plan& plan, int eight) {
  const int unit = eight * kUnits;
  return {unit / plan.units, unit % plan.units};
}

// The element of a block's matrix at a row and a column; 0 where there is none.
template <class S, bool kBackward>
SEQKERNELS_FN S weight_at(const Plan& plan, const Job& job, int rank, int row, int column) {
  const int H = plan.hidden, U = plan.units, G = plan.gates();
  int gate, unit, other;  // row gate * H + unit of the weights, and their column
  if (kBackward) {
    gate = column / U;
    unit = rank * U + column % U;
    other = row;
  } else {
    const OwnRows own = own_rows(plan, row / kUnits);
    gate = own.gate;
    unit = own.unit < U ? rank * U + own.unit + row % kUnits : H;
    other = column;
  }
  const bool there = gate < G && unit < H && other < H;
  return there ? static_cast<const S*>(job.weight_hh)[(static_cast<std::int64_t>(gate) * H + unit) * H + other] : S{};
}

// Which tiles a warp has.
struct Share {
  int row, column;  // its place among warps of other rows, of other columns
  bool any;
};
SEQKERNELS_FN Share share_of(const Plan& plan, int warp) {
  const Split& split = plan.split;
  return {warp % split.row_warps, warp / split.row_warps, warp < split.row_warps * split.column_warps};
}
SEQKERNELS_FN int tile_row(const Plan& plan, const Share& share, int batch, int m) {
  const int rows = plan.held_tiles().rows, warps = plan.split.row_warps;
  return batch == 0 ? share.row * rows + m : warps * rows + ((batch - 1) * rows + m) * warps + share.row;
}

template <class M, int kRows, int kColumns>
struct Weights {
  std::uint32_t tile[kRows][kColumns][M::kHere][4];
};

struct Fragment {
  std::uint32_t word[4];
};

// A lane's part of a tile.
template <class E, bool kBackward>
SEQKERNELS_ONCE Fragment fragment_at(const Plan& plan, const Job& job, int rank, int tile_row, int tile_column,
                                     int lane) {
  using S = typename E::Storage;
  constexpr int kValues = 4 / sizeof(S);
  Fragment found{};
  if (tile_row >= plan.tile_rows()) return found;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const Cut cut = cut_of(lane, r);
    const int row = tile_row * kTileRows + cut.row;
    const int column = (tile_column * kTileBytes + cut.byte) / static_cast<int>(sizeof(S));
    S values[kValues];
#pragma unroll
    for (int i = 0; i < kValues; ++i) values[i] = weight_at<S, kBackward>(plan, job, rank, row, column + i);
    found.word[r] = bits_as<std::uint32_t>(values);
  }
  return found;
}

// A warp's weights into its registers and, what is beyond, into `tail`.
template <class E, bool kBackward, int kRows, int kColumns, class M>
SEQKERNELS_FN void load_weights(const Plan& plan, const Job& job, int rank, int warp,
                                Weights<M, kRows, kColumns>& weights, char* tail) {
  const Share share = share_of(plan, warp);
  // A warp without a share has rows behind the last one, which are 0.
  const int columns = plan.split.columns, first = share.column * columns, none = plan.tile_rows();
  const auto fragment = [&](int batch, int m, int k, int lane) {
    return fragment_at<E, kBackward>(plan, job, rank, share.any ? tile_row(plan, share, batch, m) : none, first + k,
                                     lane);
  };
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      for (int here = 0; here < M::kHere; ++here) {
        // Columns beyond the warp's own belong to the next one, and are not multiplied here.
        const Fragment found = fragment(0, m, k, M::lane(here));
#pragma unroll
        for (int r = 0; r < 4; ++r) weights.tile[m][k][here][r] = found.word[r];
      }
    }
  }
#pragma unroll 1
  for (int batch = 0; share.any && batch < plan.batches(); ++batch) {
#pragma unroll 1
    for (int k = batch == 0 ? kColumns : 0; k < columns; ++k) {
#pragma unroll 1
      for (int m = 0; m < plan.batch_rows(batch); ++m, tail += kFragmentBytes) {
        for (int here = 0; here < M::kHere; ++here) {
          M::store16(tail + M::lane(here) * 16, fragment(batch, m, k, M::lane(here)).word);
        }
      }
    }
  }
}

// What lanes add up. Exact products have a lane multiply its columns by all 8 rows of the batch; the four lanes that
// share rows of tiles add up at the end, and have then what tensor cores would have left them.
template <class M, class E>
struct Sum {
  static constexpr int kWords = E::kProduct == Product::kExact ? 16 : 4;
  float value[M::kHere][kWords];
};

template <class M>
struct Operand {
  std::uint32_t word[M::kHere][4];  // of two tiles of columns
};

// Two tiles of columns of a product. `rows` are the rows of the batch, `row` bytes apart.
template <class E, int kRows, class M, class A>
SEQKERNELS_FN void multiply(const A& tile_of, const char* rows, int row, Sum<M, E>* sums) {
  if constexpr (E::kProduct == Product::kExact) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        for (int here = 0; here < M::kHere; ++here) {
          const char* at = rows + n * row + half * kTileBytes + 4 * (M::lane(here) % 4);
          float b[2];
          memcpy(&b[0], __builtin_assume_aligned(at, 4), 4);
          memcpy(&b[1], __builtin_assume_aligned(at + 16, 4), 4);
#pragma unroll
          for (int m = 0; m < kRows; ++m) {
            const std::uint32_t* a = tile_of(m, half, here);
            float* sum = sums[m].value[here];
#pragma unroll
            for (int r = 0; r < 4; ++r) sum[8 * (r & 1) + n] += bits_as<float>(a[r]) * b[r >> 1];
          }
        }
      }
    }
  } else {
    Operand<M> b;
    M::load_rows(rows, row, b);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int m = 0; m < kRows; ++m)
        M::template mma<E>(sums[m], [&](int here) { return tile_of(m, half, here); }, b, half);
    }
  }
}

// Product of batch `batch` of rows of tiles by 8 rows of the batch, from `rows` on, into `sums`.
template <class E, int kRows, int kColumns, class M>
SEQKERNELS_FN void product(const Plan& plan, const Weights<M, kRows, kColumns>& weights, const char* tail, int batch,
                           const char* rows, Sum<M, E> (&sums)[kRows]) {
  const int columns = plan.split.columns, row = plan.operand_row();
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
    for (int here = 0; here < M::kHere; ++here) {
#pragma unroll
      for (int i = 0; i < Sum<M, E>::kWords; ++i) sums[m].value[here][i] = 0.0f;
    }
  }
  int first = 0;
  if (batch == 0) {
#pragma unroll
    for (int k = 0; k < kColumns; k += 2) {
      if (k < columns) {
        multiply<E, kRows, M>([&](int m, int half, int here) { return weights.tile[m][k + half][here]; },
                              rows + k * kTileBytes, row, sums);
      }
    }
    first = kColumns;
  } else {
    tail += (most(columns - kColumns, 0) + (batch - 1) * columns) * kRows * kFragmentBytes;
  }
  const int tiles_there = plan.batch_rows(batch);
#pragma unroll 1
  for (int k = first; k < columns; k += 2, tail += 2 * tiles_there * kFragmentBytes) {
    std::uint32_t tiles[2][kRows][M::kHere][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        for (int here = 0; here < M::kHere; ++here) {
          const char* at = tail + (half * tiles_there + m) * kFragmentBytes + M::lane(here) * 16;
          if (m < tiles_there) {
            M::load16(at, tiles[half][m][here]);
          } else {
            for (int r = 0; r < 4; ++r) tiles[half][m][here][r] = 0;
          }
        }
      }
    }
    multiply<E, kRows, M>([&](int m, int half, int here) { return tiles[half][m][here]; }, rows + k * kTileBytes, row,
                          sums);
  }
  if constexpr (E::kProduct == Product::kExact) {
#pragma unroll
    for (int m = 0; m < kRows; ++m) M::gather(sums[m]);
  }
}

}  // namespace
}  // namespace seqkernels::persistent
