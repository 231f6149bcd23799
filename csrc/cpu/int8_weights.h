// Packed int8 weights of one block, forward only: panels in the column orders of layout.h, or for the token mixer
// mlp_t, which multiplies from the left, rows.
#pragma once

#include "quantize.h"
#include "weights.h"

namespace trmfast {
namespace TRMFAST_NAMESPACE {

// Bytes from row to row of an operand: products read the padded depth, and one more line keeps consecutive rows out of
// the same cache sets.
constexpr long int8_stride(int columns) { return round_up(columns, 64) + 64; }

struct Int8Rows {
  uint8_t* rows = nullptr;
  float* scales = nullptr;
};

inline Int8Matrix take_int8_matrix(Arena& arena, int depth, int columns) {
  const int padded = round_up(columns, kPanel);
  return {arena.take<int8_t>(packed_elements<int8_t>(depth, columns)), arena.take<float>(padded),
          arena.take<int32_t>(padded)};
}

template <> struct ForwardWeights<int8_t> {
  Int8Matrix qkv, output;         // attention
  Int8Rows seq_gate_up, seq_down; // mlp_t
  Int8Matrix gate_up, down;
  BlockVectors vectors;
  ConvWeights<bf16> conv;

  ForwardWeights(Arena& arena, const BlockShape& block) : vectors(arena, block), conv(arena, block) {
    const HeadLayout heads(block);
    const GateLayout gates(block);
    if (block.attention) {
      qkv = take_int8_matrix(arena, block.width, heads.columns());
      output = take_int8_matrix(arena, heads.output_columns(), block.width);
    } else {
      seq_gate_up = {arena.take<uint8_t>(2L * block.seq_inner * int8_stride(block.seq_len)),
                     arena.take<float>(2L * block.seq_inner)};
      seq_down = {arena.take<uint8_t>(block.seq_len * int8_stride(block.seq_inner)), arena.take<float>(block.seq_len)};
    }
    gate_up = take_int8_matrix(arena, block.width, gates.columns());
    down = take_int8_matrix(arena, gates.activation_columns(), block.width);
  }
};

template <class RowOf>
void pack_int8_matrix(const float* w, int columns, int depth, const Int8Matrix& to, PackTurn& turn, RowOf row_of) {
  for (int first = 0; first < columns; first += kPanel) {
    if (!turn.mine()) continue;
    pack_int8_panel(
        [&](int j) {
          const int row = first + j < columns ? row_of(first + j) : -1;
          return row < 0 ? nullptr : w + static_cast<long>(row) * depth;
        },
        depth, to.panels + first / kPanel * panel_elements<int8_t>(depth), to.scales + first, to.starts + first);
  }
}

inline void pack_int8_rows(const float* w, int rows, int columns, const Int8Rows& to, PackTurn& turn) {
  const long stride = int8_stride(columns);
  for (int r = 0; r < rows; ++r)
    if (turn.mine())
      pack_int8_row(w + static_cast<long>(r) * columns, columns, to.rows + r * stride, stride, to.scales + r);
}

// weights: the f32 tensors of a block in the order of trmfast/spec.py.
inline void pack_forward(const BlockShape& block, const float* const* weights, const ForwardWeights<int8_t>& to,
                         PackTurn& turn) {
  const HeadLayout heads(block);
  const WeightPlaces places(block);
  const GateLayout gates(block);
  const int D = block.width;
  const auto same = [](int n) { return n; };
  if (block.attention) {
    pack_int8_matrix(weights[places.mixer_in], heads.columns(), D, to.qkv, turn,
                     [&](int n) { return heads.qkv_row(n); });
    pack_int8_matrix(weights[places.mixer_out], D, heads.output_columns(), to.output, turn, same);
  } else {
    pack_int8_rows(weights[places.mixer_in], 2 * block.seq_inner, block.seq_len, to.seq_gate_up, turn);
    pack_int8_rows(weights[places.mixer_out], block.seq_len, block.seq_inner, to.seq_down, turn);
  }
  pack_int8_matrix(weights[places.up], gates.columns(), D, to.gate_up, turn, [&](int n) { return gates.row(n); });
  pack_conv(block, weights, to.conv, turn);
  pack_int8_matrix(weights[places.down], D, block.inner, to.down, turn, same);
  pack_vectors(block, weights, to.vectors, turn);
}

} // namespace TRMFAST_NAMESPACE
} // namespace trmfast
