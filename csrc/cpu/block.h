// One block forward over the sequences of a team:
//
//   attention   h -> [q k v] + rotation -> attention -> u = h + W_o . -> h1 = norm(u)      (attention.h)
//   mlp_t       h -> SwiGLU over the sequence, norm over the sequence -> h1                (mixer_mlp_t.h)
//   both        h1 -> SwiGLU (-> convolution, SiLU) -> u = h1 + W_down . -> out = norm(u)
//
// Activations are the element type with f32 only in u, the residual sum before a norm, and in the tiles in L1.
#pragma once

#include "attention.h"
#include "conv_swiglu.h"
#include "mixer_mlp_t.h"
#include "norm.h"
#include "swiglu.h"
#include "weights.h"

namespace trmfast {
namespace TRMFAST_NAMESPACE {

struct BlockStrides {
  long h, qkv, mixed, gate_up, activation, u;

  explicit BlockStrides(const BlockShape& block)
      : h(row_stride(block.width)), qkv(row_stride(HeadLayout(block).columns())),
        mixed(row_stride(HeadLayout(block).output_columns())), gate_up(row_stride(GateLayout{block.inner}.columns())),
        activation(row_stride(GateLayout{block.inner}.activation_columns())), u(round_up(block.width, kPanel)) {}
};

// What a block computes, one row per token.  gate_up, rstd1 and rstd2 are null if no backward follows.
template <class T> struct BlockActivations {
  T* h;                     // the block's input
  T* qkv;                   // queries and keys rotated (attention)
  T* mixed;                 // attention output before W_o
  MlpTActivations<T> mlp_t; // mlp_t
  T* h1;                    // after the first norm
  T* gate_up;               // before the gate
  T* activation;            // silu(gate) * up
  T* convolved;             // the SiLU of its convolution (conv_swiglu)
  float* rstd1;             // of the two norms: one per token
  float* rstd2;
};

template <class T> T* down_input(const BlockShape& block, const BlockActivations<T>& act) {
  return block.conv_taps ? act.convolved : act.activation;
}

template <class T> struct BlockScratch {
  float* tile; // [kRows, 32]
  AttentionScratch<T> attention;
  MlpTScratch<T> mlp_t;

  BlockScratch(Arena& arena, const BlockShape& block, int length)
      : tile(arena.take<float>(Dot<T>::kRows * kPanel)),
        attention(arena, HeadLayout(block), block.attention ? length : 0), mlp_t(arena, block) {}
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

template <class T>
void norm_rows(const Team& team, int rows, const BlockShape& block, const float* u, long u_stride, T* y, long y_stride,
               float* r) {
  const Range range = team.split(rows);
  for (int t = range.begin; t < range.end; ++t) {
    const float scale = rms_norm(u + t * u_stride, block.width, block.eps, y + t * y_stride);
    if (r) r[t] = scale;
  }
}

// Epilogue: qkv <- rotated queries and keys, values
template <class T>
auto qkv_epilogue(const BlockShape& block, const Rope& rope, int length, const BlockActivations<T>& act) {
  const HeadLayout heads(block);
  const long stride = BlockStrides(block).qkv;
  const int rotated = rope.cos ? heads.value(0) : 0;
  return [=](int row, int n, int panel, const float* tile) {
    const int c = panel * kPanel;
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

// Epilogue: activation <- silu(gate) * up
template <class T> auto gate_up_epilogue(const BlockShape& block, const BlockActivations<T>& act) {
  const BlockStrides strides(block);
  return [=](int row, int n, int panel, const float* tile) {
    for_rows(row, n, tile, [&](int t, const float* in) {
      T* to = act.activation + t * strides.activation + panel * kHalf;
      for (int j = 0; j < kHalf; j += kLanes) store(to + j, swiglu<T>(load(in + j), load(in + kHalf + j)));
      if (act.gate_up) store_group(in, act.gate_up + t * strides.gate_up + panel * kPanel);
    });
  };
}

// out: [rows, out_stride].  u: f32 [rows, strides.u], scratch of the team.
template <class T>
void block_forward(const Team& team, const BlockShape& block, const ForwardWeights<T>& weights, const Rope& rope,
                   int sequences, int length, const BlockActivations<T>& act, float* u, T* out, long out_stride,
                   const BlockScratch<T>& scratch) {
  const BlockStrides strides(block);
  const HeadLayout heads(block);
  const int rows = sequences * length, D = block.width;
  if (block.attention) {
    team.begin("qkv");
    gemm(team, act.h, strides.h, rows, weights.qkv, D, heads.columns(), scratch.tile,
         qkv_epilogue(block, rope, length, act));
    team.sync();
    team.begin("attention");
    attention_forward(team, block, sequences, length, act.qkv, strides.qkv, act.mixed, strides.mixed,
                      scratch.attention);
    team.sync();
    team.begin("attention output");
    gemm(team, act.mixed, strides.mixed, rows, weights.output, heads.output_columns(), D, scratch.tile,
         [&](int row, int n, int panel, const float* tile) {
           add_residual(row, n, panel, tile, act.h, strides.h, u, strides.u);
         });
    team.sync();
    team.begin("norm");
    norm_rows(team, rows, block, u, strides.u, act.h1, strides.h, act.rstd1);
  } else {
    team.begin("sequence mlp");
    mlp_t_forward(team, block, weights.seq_gate_up, weights.seq_down, sequences, act.h, strides.h, act.h1, act.mlp_t,
                  scratch.mlp_t);
  }
  team.sync();
  team.begin("gate and up");
  gemm(team, act.h1, strides.h, rows, weights.gate_up, D, GateLayout{block.inner}.columns(), scratch.tile,
       gate_up_epilogue(block, act));
  team.sync();
  if (block.conv_taps) {
    team.begin("convolution");
    convolve_rows(team, block, weights.conv, rows, length, act.activation, act.convolved, strides.activation);
    team.sync();
  }
  team.begin("down");
  gemm(team, down_input(block, act), strides.activation, rows, weights.down, block.inner, D, scratch.tile,
       [&](int row, int n, int panel, const float* tile) {
         add_residual(row, n, panel, tile, act.h1, strides.h, u, strides.u);
       });
  team.sync();
  team.begin("norm");
  norm_rows(team, rows, block, u, strides.u, out, out_stride, act.rstd2);
  team.sync();
}

// Zeroes what products read beyond the last column: [columns, up to) of every row.  Buffers live longer than the
// sequences in them, so nothing is ever written there: the 0 x NaN of one sequence would reach all that follow.
template <class T> void clear_padding(T* x, int rows, int columns, long up_to, long stride) {
  if (!x || columns >= up_to) return;
  for (int t = 0; t < rows; ++t)
    __builtin_memset(static_cast<void*>(x + t * stride + columns), 0, static_cast<size_t>(up_to - columns) * sizeof(T));
}

// Whether products read beyond the last column of h, h1, the input of W_down or mixed.
inline bool has_padding(const BlockShape& block) {
  return block.width % kPanel != 0 || GateLayout{block.inner}.activation_columns() % kPanel != 0 ||
         (block.attention && HeadLayout(block).output_columns() % kPanel != 0);
}

template <class T> void clear_activation_padding(const BlockShape& block, int rows, const BlockActivations<T>& act) {
  const BlockStrides strides(block);
  const int activation = GateLayout{block.inner}.activation_columns(), mixed = HeadLayout(block).output_columns();
  clear_padding(act.h, rows, block.width, round_up(block.width, kPanel), strides.h);
  clear_padding(act.h1, rows, block.width, round_up(block.width, kPanel), strides.h);
  clear_padding(down_input(block, act), rows, activation, round_up(activation, kPanel), strides.activation);
  if (block.attention) clear_padding(act.mixed, rows, mixed, round_up(mixed, kPanel), strides.mixed);
}

} // namespace TRMFAST_NAMESPACE
} // namespace trmfast
