// One block forward with int8 operands in the products by weights; everything else is that of the bf16 block in
// block.h, whose rows are rounded to bf16, then quantised, a row while it is in L1.
#pragma once

#include "block.h"
#include "int8_weights.h"

namespace trmfast {
namespace TRMFAST_NAMESPACE {

// The rows of the next product, one array for all products of a block: q + 128, and a scale for each row.
struct Int8Operand {
  uint8_t* q;
  float* scales;
  long stride;

  Int8Operand(Arena& arena, const BlockShape& block, int rows)
      : stride(int8_stride(larger(larger(block.width, block.inner), HeadLayout(block).output_columns()))) {
    q = arena.take<uint8_t>(rows * stride);
    scales = arena.take<float>(rows);
  }
  void set(int t, const bf16* x, int columns) const { scales[t] = quantize_row(x, columns, q + t * stride); }
};

// As gemm() in gemm.h.
template <class Epilogue, class Product = Dot<int8_t>>
void gemm(const Team& team, const Int8Operand& a, int rows, const Int8Matrix& weights, int depth, int columns,
          float* tile, Epilogue&& epilogue) {
  if constexpr (Product::kWholeRows > 1) {
    const auto product = [&](int row, int n, int p, int from, int size, float* c, Prefetch next, auto&& meanwhile) {
      Product::multiply(a.q + row * a.stride + from, a.stride,
                        weights.panels + p * panel_elements<int8_t>(depth) + from * kPanel, size, n, c, kPanel,
                        from > 0, next, meanwhile);
    };
    const auto finish = [&](int row, int n, int p, float* c) {
      Product::finish(n, weights.starts + p * kPanel, {a.scales + row, weights.scales + p * kPanel}, c, kPanel);
      epilogue(row, n, p, c);
    };
    gemm_beside(team, rows, weights.panels, depth, columns, tile, product, finish);
  } else {
    const RowTiles<Dot<int8_t>> tiles(rows);
    const int padded = padded_depth<int8_t>(depth);
    const long bytes = panel_elements<int8_t>(depth), share = bytes / tiles.count;
    const Range range = team.split(ceil_div(columns, kPanel));
    for (int p = range.begin; p < range.end && !team.stopped(); ++p) {
      const int8_t* panel = weights.panels + p * bytes;
      for (int i = 0; i < tiles.count; ++i) {
        const int row = tiles.begin(i), n = tiles.size(i);
        Product::run(a.q + row * a.stride, a.stride, panel, padded, n, weights.starts + p * kPanel,
                     {a.scales + row, weights.scales + p * kPanel}, tile, kPanel, {panel + bytes + i * share, share});
        epilogue(row, n, p, tile);
      }
    }
  }
}

template <> struct MlpTScratch<int8_t> {
  int8_t *input, *quantized;          // panels of h, depth L, and of the activation, depth seq_inner
  float *input_scales, *inner_scales; // of a channel
  int32_t *input_starts, *inner_starts;
  bf16* activation; // silu(gate) * up, rows of 32 channels
  float* u;         // [L, 32]
  float *gate, *up; // tiles

  MlpTScratch(Arena& arena, const BlockShape& block)
      : input(arena.take<int8_t>(panel_elements<int8_t>(block.seq_len))),
        quantized(arena.take<int8_t>(panel_elements<int8_t>(block.seq_inner))), input_scales(arena.take<float>(kPanel)),
        inner_scales(arena.take<float>(kPanel)), input_starts(arena.take<int32_t>(kPanel)),
        inner_starts(arena.take<int32_t>(kPanel)),
        activation(arena.take<bf16>(static_cast<long>(block.seq_inner) * kPanel)),
        u(arena.take<float>(static_cast<long>(block.seq_len) * kPanel)),
        gate(arena.take<float>(Dot<int8_t>::kRows * kPanel)), up(arena.take<float>(Dot<int8_t>::kRows * kPanel)) {}
};

// As mlp_t_forward() in mixer_mlp_t.h.  The weights are the rows; the sums run over the tokens of a channel, so each
// channel of a sequence has a scale, of h and again of the activation.
inline void mlp_t_forward(const Team& team, const BlockShape& block, const Int8Rows& gate_up, const Int8Rows& down,
                          int sequences, const bf16* h, long stride, bf16* h1, const MlpTScratch<int8_t>& scratch) {
  const int L = block.seq_len, inner = block.seq_inner, panels = ceil_div(block.width, kPanel);
  const int depth = padded_depth<int8_t>(L), inner_depth = padded_depth<int8_t>(inner);
  const long in_stride = int8_stride(L), inner_stride = int8_stride(inner);
  const RowTiles<Dot<int8_t>> features(inner), positions(L);
  const Range items = team.split(sequences * panels);
  for (int item = items.begin; item < items.end; ++item) {
    const int sequence = item / panels, c = item % panels * kPanel, columns = smaller(kPanel, block.width - c);
    const bf16* x = h + static_cast<long>(sequence) * L * stride + c;
    quantize_panel(x, stride, L, columns, scratch.input, scratch.input_scales, scratch.input_starts);
    const auto multiply_rows = [&](int row, int n, float* tile) {
      Dot<int8_t>::run(gate_up.rows + row * in_stride, in_stride, scratch.input, depth, n, scratch.input_starts,
                       {gate_up.scales + row, scratch.input_scales}, tile, kPanel);
    };
    for (int i = 0; i < features.count; ++i) {
      if (team.stopped()) return;
      const int row = features.begin(i), n = features.size(i);
      multiply_rows(row, n, scratch.gate);
      multiply_rows(inner + row, n, scratch.up);
      for (int j = 0; j < n * kPanel; j += kLanes)
        store(scratch.activation + row * kPanel + j, swiglu<bf16>(load(scratch.gate + j), load(scratch.up + j)));
    }
    quantize_panel(scratch.activation, kPanel, inner, kPanel, scratch.quantized, scratch.inner_scales,
                   scratch.inner_starts);
    for (int i = 0; i < positions.count; ++i) {
      const int row = positions.begin(i), n = positions.size(i), lead = positions.lead(i), from = row - lead;
      Dot<int8_t>::run(down.rows + from * inner_stride, inner_stride, scratch.quantized, inner_depth, lead + n,
                       scratch.inner_starts, {down.scales + from, scratch.inner_scales}, scratch.gate, kPanel);
      for_rows(row, n, scratch.gate + lead * kPanel, [&](int t, const float* in) {
        for (int j = 0; j < kPanel; j += kLanes)
          store(scratch.u + t * kPanel + j, load(x + t * stride + j) + load(in + j));
      });
    }
    norm_over_positions(block, scratch.u, columns, h1 + static_cast<long>(sequence) * L * stride + c, stride, nullptr);
  }
}

template <> struct BlockScratch<int8_t> {
  float* tile;
  AttentionScratch<bf16> attention;
  MlpTScratch<int8_t> mlp_t;

  BlockScratch(Arena& arena, const BlockShape& block, int length, int rows)
      : tile(arena.take<float>(tile_floats<int8_t>(rows))), attention(arena, block, length), mlp_t(arena, block) {}
};

inline void quantize_rows(const Team& team, int rows, const bf16* x, long stride, int columns, const Int8Operand& to) {
  const Range range = team.split(rows);
  for (int t = range.begin; t < range.end; ++t) to.set(t, x + t * stride, columns);
}

// y <- norm(u), which is the next product's operand too.
inline void norm_rows(const Team& team, int rows, const BlockShape& block, const float* u, long u_stride, bf16* y,
                      long y_stride, const Int8Operand& operand) {
  const Range range = team.split(rows);
  for (int t = range.begin; t < range.end; ++t) {
    rms_norm<float, bf16>(u + t * u_stride, block.width, block.eps, nullptr, nullptr, nullptr, y + t * y_stride);
    operand.set(t, y + t * y_stride, block.width);
  }
}

// As block_forward() in block.h.  `operand` holds h on entry, and out afterwards.
inline void block_forward(const Team& team, const BlockShape& block, const ForwardWeights<int8_t>& weights,
                          const Positions& positions, int sequences, int length, const BlockActivations<bf16>& act,
                          const Int8Operand& operand, float* u, bf16* out, long out_stride,
                          const BlockScratch<int8_t>& scratch) {
  const BlockStrides strides(block);
  const HeadLayout heads(block);
  const int rows = sequences * length, D = block.width;
  const auto add_to = [&](const bf16* residual) {
    return [=](int row, int n, int panel, const float* tile) {
      add_residual(row, n, panel, tile, residual, strides.h, u, strides.u);
    };
  };
  if (block.attention) {
    team.begin("qkv");
    gemm(team, operand, rows, weights.qkv, D, heads.columns(), scratch.tile,
         qkv_epilogue(block, weights.vectors, positions.rope, length, act));
    team.sync();
    team.begin("attention");
    attention_forward(team, block, weights.vectors, positions, sequences, length, act.qkv, strides.qkv, act.mixed,
                      strides.mixed, scratch.attention);
    team.sync();
    team.begin("attention output");
    quantize_rows(team, rows, act.mixed, strides.mixed, heads.output_columns(), operand);
    team.sync();
    gemm(team, operand, rows, weights.output, heads.output_columns(), D, scratch.tile, add_to(act.h));
    team.sync();
    team.begin("norm");
    norm_rows(team, rows, block, u, strides.u, act.h1, strides.h, operand);
  } else {
    team.begin("mlp_t");
    mlp_t_forward(team, block, weights.seq_gate_up, weights.seq_down, sequences, act.h, strides.h, act.h1,
                  scratch.mlp_t);
    team.sync();
    quantize_rows(team, rows, act.h1, strides.h, D, operand);
  }
  team.sync();
  team.begin("gate and up");
  gemm(team, operand, rows, weights.gate_up, D, GateLayout(block).columns(), scratch.tile,
       gate_up_epilogue(block, act));
  team.sync();
  if (block.conv_taps) {
    team.begin("convolution");
    convolve_rows(team, block, weights.conv, rows, length, act.activation, act.convolved, strides.activation);
    team.sync();
  }
  team.begin("down");
  quantize_rows(team, rows, down_input(block, act), strides.activation, block.inner, operand);
  team.sync();
  gemm(team, operand, rows, weights.down, block.inner, D, scratch.tile, add_to(act.h1));
  team.sync();
  team.begin("norm");
  norm_rows(team, rows, block, u, strides.u, out, out_stride, operand);
  team.sync();
}

} // namespace TRMFAST_NAMESPACE
} // namespace trmfast
