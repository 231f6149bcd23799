// The product of a CTA's rows in shared memory with streamed weights, into registers.  Every warp computes all rows
// for its own share of the output columns, so a weight is read once per CTA and belongs to one warp.
//
// Accumulators are squares of 16 rows x 16 output columns, acc[row tile][2 * square + half].
//
//   straight     rows x weights: half = columns 0-7 or 8-15 of the square, fragment d = (row g [+ 8], columns 2t)
//   transposed   weights x rows^T: half = rows 0-7 or 8-15 of the row tile, d = (column g [+ 8], rows 2t); for results
//                that are read by column
//
// Rows in shared memory are stored by row [row][depth], or by depth [depth][row] with ldmatrix transposing.
#pragma once

#include "stream.cuh"

namespace trmfast {
namespace gpu {

enum class Order { kStraight, kTransposed };
enum class Storage { kByRow, kByDepth };

template <int kRowTiles, int kTiles> DEVICE void clear(float (&acc)[kRowTiles][kTiles][4]) {
  UNROLL
  for (int r = 0; r < kRowTiles; ++r) {
    UNROLL
    for (int n = 0; n < kTiles; ++n) {
      UNROLL
      for (int i = 0; i < 4; ++i) {
        acc[r][n][i] = 0.0f;
      }
    }
  }
}

// Where this lane reads 16 rows x 16 deep with ldmatrix_x4 as fragment a.
template <Storage kStorage, class T> DEVICE SharedPtr<const T> lane_rows(SharedPtr<const T> rows, int stride) {
  const int lane = lane_index();
  if (kStorage == Storage::kByRow) return rows + (lane % 16 * stride + lane / 16 * 8);
  return rows + ((lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8);
}

template <Storage kStorage, class T> DEVICE void load_rows(uint32_t (&a)[4], SharedPtr<const T> at) {
  if constexpr (kStorage == Storage::kByRow)
    ldmatrix_x4(a, at);
  else
    ldmatrix_x4_trans(a, at);
}

// One square of weights, 16 deep, with 16 rows.
template <class T, Order kOrder>
DEVICE void multiply_square(float (&first)[4], float (&second)[4], const uint32_t (&a)[4], const uint32_t (&w)[4]) {
  if constexpr (kOrder == Order::kStraight) {
    mma_m16n8k16<T>(first, a, w[0], w[1]);
    mma_m16n8k16<T>(second, a, w[2], w[3]);
  } else {
    const uint32_t by_column[4] = {w[0], w[2], w[1], w[3]};
    mma_m16n8k16<T>(first, by_column, a[0], a[2]);
    mma_m16n8k16<T>(second, by_column, a[1], a[3]);
  }
}

// acc += rows [16 * kRowTiles, 16 * steps] x the next product of the stream.
template <Order kOrder, Storage kStorage, class T, int kStages, int kRowTiles, int kTiles>
DEVICE void multiply(float (&acc)[kRowTiles][kTiles][4], SharedPtr<const T> rows, int stride, int steps,
                     WeightStream<T, kStages>& stream) {
  const int next_tile = kStorage == Storage::kByRow ? 16 * stride : 16;
  const int next_step = kStorage == Storage::kByRow ? 16 : 16 * stride;
  SharedPtr<const T> at = lane_rows<kStorage>(rows, stride);
  if constexpr (kTiles == 2) { // a stage holds two steps of one square
    NO_UNROLL
    for (int step = 0; step < steps; step += 2) {
      const SharedPtr<const T> weights = stream.next();
      UNROLL
      for (int s = 0; s < 2; ++s) {
        uint32_t w[4];
        ldmatrix_x4(w, weights + s * kSquare);
        UNROLL
        for (int r = 0; r < kRowTiles; ++r) {
          uint32_t a[4];
          load_rows<kStorage>(a, at + r * next_tile);
          multiply_square<T, kOrder>(acc[r][0], acc[r][1], a, w);
        }
        at = at + next_step;
      }
    }
  } else if constexpr (kTiles == 4) { // a stage is one step; rows use few registers
    NO_UNROLL
    for (int step = 0; step < steps; ++step) {
      const SharedPtr<const T> weights = stream.next();
      uint32_t w[2][4];
      ldmatrix_x4(w[0], weights);
      ldmatrix_x4(w[1], weights + kSquare);
      UNROLL
      for (int r = 0; r < kRowTiles; ++r) {
        uint32_t a[4];
        load_rows<kStorage>(a, at + r * next_tile);
        multiply_square<T, kOrder>(acc[r][0], acc[r][1], a, w[0]);
        multiply_square<T, kOrder>(acc[r][2], acc[r][3], a, w[1]);
      }
      at = at + next_step;
    }
  } else { // a step takes kTiles / 4 stages
    NO_UNROLL
    for (int step = 0; step < steps; ++step) {
      uint32_t a[kRowTiles][4];
      UNROLL
      for (int r = 0; r < kRowTiles; ++r) load_rows<kStorage>(a[r], at + r * next_tile);
      at = at + next_step;
      UNROLL
      for (int unit = 0; unit < kTiles / 4; ++unit) {
        const SharedPtr<const T> weights = stream.next();
        UNROLL
        for (int s = 0; s < 2; ++s) {
          uint32_t w[4];
          ldmatrix_x4(w, weights + s * kSquare);
          const int n = unit * 4 + s * 2;
          UNROLL
          for (int r = 0; r < kRowTiles; ++r) multiply_square<T, kOrder>(acc[r][n], acc[r][n + 1], a[r], w);
        }
      }
    }
  }
}

// A square as four words, the record that another product loads as fragments b of two tiles (straight squares as keys,
// transposed squares as values: attention.cuh).
template <class T> DEVICE U32x4 square_words(const float (&first)[4], const float (&second)[4]) {
  return {{pack<T>(first[0], first[1]), pack<T>(second[0], second[1]), pack<T>(first[2], first[3]),
           pack<T>(second[2], second[3])}};
}

} // namespace gpu
} // namespace trmfast
