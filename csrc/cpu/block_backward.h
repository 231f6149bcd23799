// One block backward over the sequences of a team, from activations that block_forward kept:
//
//   d(out) -> norm -> ds2 -> W_down (-> SiLU, convolution) -> d(gate, up) -> W_gate_up, + ds2 -> d(h1)
//   attention: d(h1) -> norm -> ds1 -> W_o -> dO -> attention -> d(q, k, v) -> W_qkv, + ds1 -> d(h)
//   mlp_t:     d(h1) -> mixer_mlp_t_backward.h -> d(h)
//
// The running gradient is f32; what a weight gradient reads is rounded to the element type and stays in the store.
#pragma once

#include "attention_backward.h"
#include "block.h"
#include "mixer_mlp_t_backward.h"

namespace trmfast {
namespace TRMFAST_NAMESPACE {

template <class T> struct BlockGradients {
  T* ds1; // of the residual sums, [rows, stride of h]
  T* ds2;
  T* dconv; // of the convolution before its SiLU, [rows, stride of activation]
  // Gradients of the activations of the same name; may share their memory once those are dead.
  T *qkv, *gate_up, *sequence_gate_up;
};

template <class T> struct BlockBackwardScratch {
  float* tile;
  AttentionBackwardScratch<T> attention;
  MlpTBackwardScratch<T> mlp_t;

  BlockBackwardScratch(Arena& arena, const BlockShape& block, int length)
      : tile(arena.take<float>(Dot<T>::kRows * kPanel)),
        attention(arena, HeadLayout(block), block.attention ? length : 0), mlp_t(arena, block) {}
};

template <class T>
void norm_rows_backward(const Team& team, int rows, const BlockShape& block, const T* y, long y_stride, const float* r,
                        float* dy, long dy_stride, T* du, long du_stride) {
  const Range range = team.split(rows);
  for (int t = range.begin; t < range.end; ++t)
    rms_norm_backward(dy + t * dy_stride, y + t * y_stride, r[t], block.width, block.eps, du + t * du_stride);
}

// dy[row, group] += tile; the padding of dy stays zero.
TRMFAST_INLINE void add_tile(int row, int rows, int panel, int width, const float* tile, float* dy, long stride) {
  const int columns = smaller(kPanel, width - panel * kPanel);
  for_rows(row, rows, tile, [&](int t, const float* in) {
    float* to = dy + t * stride + panel * kPanel;
    for (int j = 0; j < columns; j += kLanes)
      store_lanes(to + j, load(to + j) + load(in + j), smaller(kLanes, columns - j));
  });
}

// grad_gate_up <- gradient of gate and up; the tile is the gradient of 32 columns of the activation, two groups of
// gate_up.
template <class T>
TRMFAST_INLINE void backward_gates(int row, int rows, int panel, int columns, const float* tile, const T* gate_up,
                                   T* grad_gate_up, long stride) {
  for_rows(row, rows, tile, [&](int t, const float* in) {
    for (int half = 0; half < 2; ++half) {
      const int c = (2 * panel + half) * kPanel;
      if (c >= columns) return;
      for (int j = 0; j < kHalf; j += kLanes) {
        const long at = t * stride + c + j;
        const GateGradient d =
            swiglu_backward<T>(load(gate_up + at), load(gate_up + at + kHalf), load(in + half * kHalf + j));
        store(grad_gate_up + at, d.gate);
        store(grad_gate_up + at + kHalf, d.up);
      }
    }
  });
}

// dy: gradient of the block's output on entry, of its input on return.  out: the block's output.
// grad_mixed: [rows, stride of mixed], scratch of the team.
template <class T>
void block_backward(const Team& team, const BlockShape& block, const BackwardWeights<T>& weights, const Rope& rope,
                    int sequences, int length, const BlockActivations<T>& act, const T* out, float* dy,
                    const BlockGradients<T>& grads, T* grad_mixed, const BlockBackwardScratch<T>& scratch) {
  const BlockStrides strides(block);
  const HeadLayout heads(block);
  const int rows = sequences * length, D = block.width, gate_columns = GateLayout{block.inner}.columns();
  const auto add = [&](int row, int n, int panel, const float* tile) {
    add_tile(row, n, panel, D, tile, dy, strides.u);
  };

  team.begin("norm backward");
  norm_rows_backward(team, rows, block, out, strides.h, act.rstd2, dy, strides.u, grads.ds2, strides.h);
  team.sync();
  team.begin("down backward");
  gemm(team, grads.ds2, strides.h, rows, weights.down, D, gate_columns / 2, scratch.tile,
       [&](int row, int n, int panel, const float* tile) {
         if (block.conv_taps)
           silu_rows_backward(row, n, panel, tile, block.conv_taps, length, weights.conv, act.activation, grads.dconv,
                              strides.activation);
         else
           backward_gates(row, n, panel, gate_columns, tile, act.gate_up, grads.gate_up, strides.gate_up);
       });
  team.sync();
  if (block.conv_taps) {
    team.begin("convolution backward");
    gate_rows_backward(team, block, weights.conv, rows, length, grads.dconv, strides.activation, act.gate_up,
                       grads.gate_up, strides.gate_up);
    team.sync();
  }
  team.begin("gate and up backward");
  gemm(team, grads.gate_up, strides.gate_up, rows, weights.gate_up, gate_columns, D, scratch.tile, add);
  team.sync();
  if (!block.attention) {
    team.begin("sequence mlp backward");
    mlp_t_backward(team, block, weights.seq_gate_up, weights.seq_down, sequences, act.h1, strides.h, dy, strides.u,
                   grads.ds1, act.mlp_t, grads.sequence_gate_up, scratch.mlp_t);
    team.sync();
    return;
  }
  team.begin("norm backward");
  norm_rows_backward(team, rows, block, act.h1, strides.h, act.rstd1, dy, strides.u, grads.ds1, strides.h);
  team.sync();
  team.begin("attention output backward");
  gemm(team, grads.ds1, strides.h, rows, weights.output, D, heads.output_columns(), scratch.tile,
       [&](int row, int n, int panel, const float* tile) {
         for_rows(row, n, tile,
                  [&](int t, const float* in) { store_group(in, grad_mixed + t * strides.mixed + panel * kPanel); });
       });
  team.sync();
  team.begin("attention backward");
  attention_backward(team, block, rope, sequences, length, act.qkv, grads.qkv, strides.qkv, grad_mixed, strides.mixed,
                     scratch.attention);
  team.sync();
  team.begin("qkv backward");
  gemm(team, grads.qkv, strides.qkv, rows, weights.qkv, heads.columns(), D, scratch.tile, add);
  team.sync();
}

} // namespace TRMFAST_NAMESPACE
} // namespace trmfast
