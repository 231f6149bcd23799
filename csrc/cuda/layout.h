// The order of packed weights.  Each warp reads its weights as one stream of 1 KB stages in order of use, so the ring
// of cp.async copies never drains between products:
//
//   packed layer    [stage][warp][2 squares][4 matrices][8 columns][8 deep]
//
// A square is 16 output columns (weight rows) x 16 deep: the four 8 x 8 matrices of one ldmatrix.x4, each 128
// contiguous bytes, as (columns 0-7, depth 0-7), (0-7, 8-15), (8-15, 0-7), (8-15, 8-15); so reads are contiguous.  (An
// 8 x 8 matrix of 128 bytes is also what wgmma takes without a swizzle.)
//
// A product of N columns runs in passes; in a pass every warp has `tiles` tiles of 8 columns.  Stages of a pass: for
// each 16 deep, tiles / 4 stages; with 2 tiles a stage holds two steps of the depth.  Packed column c of pass p, warp w
// and tile t is ((p * kWarps + w) * tiles + t) * 8 + (0..7).  Columns are ordered so that one thread holds the
// operands of an epilogue: in 16 columns
//
//   query, key   8 channels of the first half of a head | their rotation partners in the second half
//   gate/up      8 gate columns | the 8 up columns that they multiply
//
// Products of a layer:  query/key, value, output                       (attention)
//                       [gate/up pass, down pass]...  over tokens       (mlp_t; read once per tile of channels)
//                       [gate/up pass, down pass]...  over channels
#pragma once

#include "shape.h"

namespace trmfast {
namespace gpu {

// Where the 8 elements of one packed column of a matrix come from: element i is column `depth[i]` of row `row` of
// weight `weight` of the layer (order of BlockSpec.weight_shapes), or zero where row or depth is negative.
struct PackedColumn {
  int weight, row;
  int depth[8];
};

struct LayerLayout {
  BlockShape block;
  int width_tiles, token_tiles;
  int head_width;                           // padded
  int qk_passes, v_passes;                  // attention
  int width_steps, head_steps, token_steps; // depth of products in steps of 16
  int inner_passes, seq_passes;             // of the two SwiGLUs
  int qk_stages, v_stages, output_stages;   // of a whole product
  int inner_pass_stages, seq_pass_stages;   // gate/up and down of one pass
  int token_stages;                         // of the part over tokens (mlp_t)
  int stages;                               // of the layer

  LayerLayout() = default;
  // The order depends on the block alone, not on the instance that reads it.
  TRMFAST_BOTH explicit LayerLayout(const BlockShape& shape) : block(shape) {
    const bool long_tokens = !shape.attention && shape.seq_len > 16 * kWarps;
    width_tiles = shape.width <= 32 * kWarps && !long_tokens ? 4 : 8;
    token_tiles = shape.attention ? 0 : long_tokens ? 16 : 2;
    head_width = padded_head(shape.head_dim);
    const int columns = 8 * kWarps * width_tiles;
    qk_passes = shape.attention ? ceil_div((shape.heads + shape.kv_heads) * head_width, columns) : 0;
    v_passes = shape.attention ? ceil_div(shape.kv_heads * head_width, columns) : 0;
    width_steps = ceil_div(shape.width, 16);
    head_steps = shape.attention ? shape.heads * head_width / 16 : 0;
    token_steps = shape.attention ? 0 : ceil_div(shape.seq_len, 16);
    inner_passes = ceil_div(shape.inner, kPassInner);
    seq_passes = shape.attention ? 0 : ceil_div(shape.seq_inner, kPassInner);
    qk_stages = qk_passes * width_steps * width_tiles / 4;
    v_stages = v_passes * width_steps * width_tiles / 4;
    output_stages = head_steps * width_tiles / 4;
    inner_pass_stages = width_steps + kPassInner / 16 * width_tiles / 4;
    seq_pass_stages = token_steps + kPassInner / 16 * token_tiles / 4;
    token_stages = seq_passes * seq_pass_stages;
    stages = qk_stages + v_stages + output_stages + token_stages + inner_passes * inner_pass_stages;
  }

  TRMFAST_BOTH long elements() const { return static_cast<long>(stages) * kWarps * kStageElements; }
  TRMFAST_BOTH long token_elements() const { return static_cast<long>(token_stages) * kWarps * kStageElements; }

  // stage: of the layer; square, matrix, column: within the stage of a warp.
  TRMFAST_BOTH PackedColumn source(int stage, int warp, int square, int matrix, int column) const {
    PackedColumn from;
    int at = stage;
    if (at < qk_stages) {
      const Place p = place(at, width_tiles, width_steps, warp, square, matrix, column);
      const int head = p.column / head_width, in_head = p.column % head_width;
      const int pair = in_head / 16 * 8 + in_head % 8, half = block.head_dim / 2;
      const bool found = head < block.heads + block.kv_heads && pair < half;
      from.weight = 0;
      from.row = found ? head * block.head_dim + pair + (in_head % 16 < 8 ? 0 : half) : -1;
      straight(from, p.depth, block.width);
      return from;
    }
    at -= qk_stages;
    if (at < v_stages) {
      const Place p = place(at, width_tiles, width_steps, warp, square, matrix, column);
      const int head = p.column / head_width, channel = p.column % head_width;
      const bool found = head < block.kv_heads && channel < block.head_dim;
      from.weight = 0;
      from.row = found ? (block.heads + block.kv_heads + head) * block.head_dim + channel : -1;
      straight(from, p.depth, block.width);
      return from;
    }
    at -= v_stages;
    if (at < output_stages) {
      const Place p = place(at, width_tiles, head_steps, warp, square, matrix, column);
      from.weight = 1;
      from.row = p.column < block.width ? p.column : -1;
      for (int i = 0; i < 8; ++i) {
        const int channel = p.depth % head_width + i;
        from.depth[i] = channel < block.head_dim ? p.depth / head_width * block.head_dim + channel : -1;
      }
      return from;
    }
    at -= output_stages;
    if (at < token_stages)
      return swiglu(0, at, seq_pass_stages, token_steps, token_tiles, block.seq_len, block.seq_inner, warp, square,
                    matrix, column);
    return swiglu(2, at - token_stages, inner_pass_stages, width_steps, width_tiles, block.width, block.inner, warp,
                  square, matrix, column);
  }

private:
  struct Place {
    int column, depth; // of the first of the 8 elements
  };

  static TRMFAST_BOTH Place place(int stage, int tiles, int steps, int warp, int square, int matrix, int column) {
    const int per_pass = steps * tiles / 4, pass = stage / per_pass, in_pass = stage % per_pass;
    const int units = larger(1, tiles / 4);
    const int step = tiles == 2 ? 2 * in_pass + square : in_pass / units;
    const int tile = (tiles == 2 ? 0 : in_pass % units * 4 + square * 2) + matrix / 2;
    return {((pass * kWarps + warp) * tiles + tile) * 8 + column, step * 16 + matrix % 2 * 8};
  }

  static TRMFAST_BOTH void straight(PackedColumn& from, int depth, int end) {
    for (int i = 0; i < 8; ++i) from.depth[i] = depth + i < end ? depth + i : -1;
  }

  // One of the SwiGLUs: `outer` its input and output width, `weight` the index of its gate/up weight.
  static TRMFAST_BOTH PackedColumn swiglu(int weight, int stage, int pass_stages, int steps, int tiles, int outer,
                                          int inner, int warp, int square, int matrix, int column) {
    PackedColumn from;
    const int pass = stage / pass_stages, at = stage % pass_stages;
    if (at < steps) {
      const Place p = place(at, 4, steps, warp, square, matrix, column);
      const int j = pass * kPassInner + p.column / 16 * 8 + p.column % 8;
      from.weight = weight;
      from.row = j < inner ? (p.column % 16 < 8 ? j : inner + j) : -1;
      straight(from, p.depth, outer);
    } else {
      const Place p = place(at - steps, tiles, kPassInner / 16, warp, square, matrix, column);
      from.weight = weight + 1;
      from.row = p.column < outer ? p.column : -1;
      straight(from, pass * kPassInner + p.depth, inner);
    }
    return from;
  }
};

} // namespace gpu
} // namespace trmfast
