// One block forward over the sequences of a team, two halves around the residual stream:
//
//   attention   h -> [q k v] + rotation -> attention -> W_o . + h -> h1                            (attention.h)
//   mlp_t       h -> SwiGLU over the sequence, norm over the sequence -> h1                        (mixer_mlp_t.h)
//   both        h1 -> first product, activation (-> convolution, SiLU) -> W_down . + h1 -> out
//
// A norm stands before the first product of a half, on the result of its last, on the sum with the residual, or in two
// of these places.  Before a product it is one number a row, which the product's epilogue multiplies by: the product
// takes the residual stream itself.  After one, the product leaves u in f32, and a pass over rows takes the norm.
// Otherwise activations are the element type, with f32 only in the tiles in L1.
#pragma once

#include "activation.h"
#include "attention.h"
#include "conv_swiglu.h"
#include "mixer_mlp_t.h"
#include "norm.h"
#include "weights.h"

namespace trmfast {
namespace TRMFAST_NAMESPACE {

struct BlockStrides {
  long h, qkv, mixed, gate_up, activation, u;

  explicit BlockStrides(const BlockShape& block)
      : h(row_stride(block.width)), qkv(row_stride(HeadLayout(block).columns())),
        mixed(row_stride(HeadLayout(block).output_columns())), gate_up(row_stride(GateLayout(block).columns())),
        activation(row_stride(GateLayout(block).activation_columns())), u(round_up(block.width, kPanel)) {}
};

// What a block computes, one row per token.  gate_up, rstd1 and rstd2 are null where nothing keeps them.
template <class T> struct BlockActivations {
  T* h;                     // the block's input
  T* qkv;                   // queries and keys rotated (attention); with qk_norm as the product gives them
  T* mixed;                 // attention output before W_o, behind its gate
  MlpTActivations<T> mlp_t; // mlp_t
  T* h1;                    // after the first half
  T* gate_up;               // before the gate, or before the activation that has none
  T* activation;            // silu(gate) * up, or another activation
  T* convolved;             // the SiLU of its convolution (conv_swiglu)
  float* rstd1;             // of the norms of the halves' results: one per token
  float* rstd2;
  float *input_rstd1, *input_rstd2; // of the norms before the halves' first products; null: none
  T *normed1, *normed2; // what the result norms give before weight and residual, if h1 and the output are not that
};

inline bool has_result_norm(const BlockShape& block) { return block.branch_norm || block.sum_norm; }
// Whether h1 and the output are not the result norm's own output.
inline bool keeps_normed(const BlockShape& block) { return block.branch_norm || (block.sum_norm && block.norm_weight); }

template <class T> T* down_input(const BlockShape& block, const BlockActivations<T>& act) {
  return block.conv_taps ? act.convolved : act.activation;
}

template <class T> struct BlockScratch {
  float* tile; // of gemm()
  AttentionScratch<T> attention;
  MlpTScratch<T> mlp_t;

  BlockScratch(Arena& arena, const BlockShape& block, int length, int rows)
      : tile(arena.take<float>(tile_floats<T>(rows))), attention(arena, block, length), mlp_t(arena, block) {}
};

// One half's way back into the residual stream.
template <class T> struct HalfResult {
  const T* residual; // [rows, stride of h]
  float* u;          // f32 [rows, stride of u], scratch of the team, where a norm follows
  const float* weight;
  T* normed; // null: not kept, here and below
  float* rstd;
  T* out;
  long out_stride;
};

// u[row, group] <- residual + tile
template <class T>
TRMFAST_INLINE void add_residual(int row, int rows, int panel, const float* tile, const T* residual, long stride,
                                 float* u, long u_stride) {
  for_rows(row, rows, tile, [&](int t, const float* in) {
    for (int j = 0; j < kPanel; j += kLanes)
      store(u + t * u_stride + panel * kPanel + j, load(residual + t * stride + panel * kPanel + j) + load(in + j));
  });
}

// The epilogue of a half's last product.
template <class T> auto result_epilogue(const BlockShape& block, const HalfResult<T>& half) {
  const BlockStrides strides(block);
  return [=, &block](int row, int n, int panel, const float* tile) {
    if (block.branch_norm)
      for_rows(row, n, tile, [&](int t, const float* in) { store_group(in, half.u + t * strides.u + panel * kPanel); });
    else if (block.sum_norm)
      add_residual(row, n, panel, tile, half.residual, strides.h, half.u, strides.u);
    else
      for_rows(row, n, tile, [&](int t, const float* in) {
        const int c = panel * kPanel, columns = smaller(kPanel, block.width - c);
        for (int j = 0; j < columns; j += kLanes)
          store_lanes(half.out + t * half.out_stride + c + j,
                      load(half.residual + t * strides.h + c + j) + load(in + j), smaller(kLanes, columns - j));
      });
  };
}

// The norm of a half's result, if it has one.
template <class T> void norm_result(const Team& team, int rows, const BlockShape& block, const HalfResult<T>& half) {
  if (!has_result_norm(block)) return;
  team.begin("norm");
  const BlockStrides strides(block);
  const Range range = team.split(rows);
  for (int t = range.begin; t < range.end; ++t) {
    const T* residual = block.branch_norm ? half.residual + t * strides.h : nullptr;
    T* normed = half.normed ? half.normed + t * strides.h : nullptr;
    const float rstd = rms_norm(half.u + t * strides.u, block.width, block.eps, half.weight, residual, normed,
                                half.out + t * half.out_stride);
    if (half.rstd) half.rstd[t] = rstd;
  }
  team.sync();
}

// rstd <- that of the norm before a half's first product, if there is one.
template <class T>
void norm_input(const Team& team, int rows, const BlockShape& block, const T* h, float* rstd) {
  if (!block.input_norm) return;
  team.begin("norm");
  const long stride = BlockStrides(block).h;
  const Range range = team.split(rows);
  for (int t = range.begin; t < range.end; ++t) rstd[t] = rms_scale(h + t * stride, block.width, block.eps);
  team.sync();
}

// An epilogue on rows that are multiplied by `scale` first; null: by nothing.
template <class Epilogue> auto scaled(const float* scale, Epilogue epilogue) {
  return [=](int row, int n, int panel, float* tile) {
    for (int r = 0; r < n && scale; ++r)
      for (int j = 0; j < kPanel; j += kLanes) {
        float* at = tile + r * kPanel + j;
        store(at, load(at) * broadcast(scale[row + r]));
      }
    epilogue(row, n, panel, tile);
  };
}

// Epilogue: qkv <- queries and keys, rotated unless their norm comes first, values, gates
template <class T>
auto qkv_epilogue(const BlockShape& block, const BlockVectors& vectors, const Rope& rope, int length,
                  const BlockActivations<T>& act) {
  const HeadLayout heads(block);
  const long stride = BlockStrides(block).qkv;
  const int rotated = rope.cos && !block.qk_norm ? heads.value(0) : 0;
  const float* bias = vectors.qk_bias;
  const int biased = bias ? heads.value(0) : 0;
  return [=](int row, int n, int panel, float* tile) {
    const int c = panel * kPanel;
    for (int r = 0; r < n && c < biased; ++r)
      for (int j = 0; j < kPanel; j += kLanes) {
        float* at = tile + r * kPanel + j;
        store(at, load(at) + load(bias + c + j));
      }
    for_rows(row, n, tile, [&](int t, const float* in) {
      T* to = act.qkv + t * stride + c;
      if (c < rotated) {
        const long at = static_cast<long>(t % length) * rope.width + c % rope.width;
        rotate(in, rope.cos + at, rope.sin + at, to);
      } else {
        store_group(in, to);
      }
    });
  };
}

// Epilogue: activation <- silu(gate) * up, or the activation of up alone
template <class T> auto gate_up_epilogue(const BlockShape& block, const BlockActivations<T>& act) {
  const BlockStrides strides(block);
  const bool has_gate = GateLayout(block).has_gate;
  const Activation kind = block.activation;
  return [=](int row, int n, int panel, const float* tile) {
    for_rows(row, n, tile, [&](int t, const float* in) {
      if (has_gate) {
        T* to = act.activation + t * strides.activation + panel * kHalf;
        for (int j = 0; j < kHalf; j += kLanes) store(to + j, swiglu<T>(load(in + j), load(in + kHalf + j)));
      } else {
        T* to = act.activation + t * strides.activation + panel * kPanel;
        for (int j = 0; j < kPanel; j += kLanes) store(to + j, activate<T>(kind, load(in + j)));
      }
      if (act.gate_up) store_group(in, act.gate_up + t * strides.gate_up + panel * kPanel);
    });
  };
}

// out: [rows, out_stride]; it may be act.h, and where no sum is normed act.h1 may be act.h too.  Null: the last product
// and the norm of its result are left out.  u: f32 [rows, strides.u], scratch of the team.
template <class T>
void block_forward(const Team& team, const BlockShape& block, const ForwardWeights<T>& weights,
                   const Positions& positions, int sequences, int length, const BlockActivations<T>& act, float* u,
                   T* out, long out_stride, const BlockScratch<T>& scratch) {
  const BlockStrides strides(block);
  const HeadLayout heads(block);
  const BlockVectors& vectors = weights.vectors;
  const int rows = sequences * length, D = block.width;
  if (block.attention) {
    norm_input(team, rows, block, act.h, act.input_rstd1);
    team.begin("qkv");
    gemm(team, act.h, strides.h, rows, weights.qkv, D, heads.columns(), scratch.tile,
         scaled(act.input_rstd1, qkv_epilogue(block, vectors, positions.rope, length, act)));
    team.sync();
    team.begin("attention");
    attention_forward(team, block, vectors, positions, sequences, length, act.qkv, strides.qkv, act.mixed,
                      strides.mixed, scratch.attention);
    team.sync();
    team.begin("attention output");
    const HalfResult<T> half = {act.h, u, vectors.result_norm[0], act.normed1, act.rstd1, act.h1, strides.h};
    gemm(team, act.mixed, strides.mixed, rows, weights.output, heads.output_columns(), D, scratch.tile,
         result_epilogue(block, half));
    team.sync();
    norm_result(team, rows, block, half);
  } else {
    team.begin("mlp_t");
    mlp_t_forward(team, block, weights.seq_gate_up, weights.seq_down, sequences, act.h, strides.h, act.h1, act.mlp_t,
                  scratch.mlp_t);
    team.sync();
  }
  norm_input(team, rows, block, act.h1, act.input_rstd2);
  team.begin("gate and up");
  gemm(team, act.h1, strides.h, rows, weights.gate_up, D, GateLayout(block).columns(), scratch.tile,
       scaled(act.input_rstd2, gate_up_epilogue(block, act)));
  team.sync();
  if (block.conv_taps) {
    team.begin("convolution");
    convolve_rows(team, block, weights.conv, rows, length, act.activation, act.convolved, strides.activation);
    team.sync();
  }
  if (!out) return;
  team.begin("down");
  const HalfResult<T> half = {act.h1, u, vectors.result_norm[1], act.normed2, act.rstd2, out, out_stride};
  gemm(team, down_input(block, act), strides.activation, rows, weights.down, block.inner, D, scratch.tile,
       result_epilogue(block, half));
  team.sync();
  norm_result(team, rows, block, half);
}

// Whether products read beyond the last column of h, h1, the input of W_down or mixed.
inline bool has_padding(const BlockShape& block) {
  return block.width % kPanel != 0 || GateLayout(block).activation_columns() % kPanel != 0 ||
         (block.attention && HeadLayout(block).output_columns() % kPanel != 0);
}

template <class T> void clear_activation_padding(const BlockShape& block, int rows, const BlockActivations<T>& act) {
  const BlockStrides strides(block);
  const int activation = GateLayout(block).activation_columns(), mixed = HeadLayout(block).output_columns();
  clear_padding(act.h, rows, block.width, round_up(block.width, kPanel), strides.h);
  clear_padding(act.h1, rows, block.width, round_up(block.width, kPanel), strides.h);
  clear_padding(down_input(block, act), rows, activation, round_up(activation, kPanel), strides.activation);
  if (block.attention) clear_padding(act.mixed, rows, mixed, round_up(mixed, kPanel), strides.mixed);
}

} // namespace TRMFAST_NAMESPACE
} // namespace trmfast
