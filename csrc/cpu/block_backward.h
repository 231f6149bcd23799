// One block backward over the sequences of a team, from activations that block_forward kept:
//
//   d(out) -> ds2 -> W_down (-> SiLU, convolution) -> d(gate, up) -> W_gate_up, + d(out) or ds2 -> d(h1)
//   attention: d(h1) -> ds1 -> W_o -> dO -> attention -> d(q, k, v) -> W_qkv, + d(h1) or ds1 -> d(h)
//   mlp_t:     d(h1) -> mixer_mlp_t_backward.h -> d(h)
//
// ds1 and ds2 are the gradients of the halves' last products, behind a norm of their results.  Where a norm stands
// before a half's first product, d(gate, up) or d(q, k, v) is multiplied by the row's rstd, as the product's results
// were: that gives the weight's gradient with h itself, and through W the g of input_norm_backward().
// The running gradient is f32; what a weight gradient reads is rounded to the element type and stays in the store.
#pragma once

#include "attention_backward.h"
#include "block.h"
#include "mixer_mlp_t_backward.h"

namespace trmfast {
namespace TRMFAST_NAMESPACE {

template <class T> struct BlockGradients {
  T* ds1; // of the halves' last products, [rows, stride of h]
  T* ds2;
  T* dconv; // of the convolution before its SiLU, [rows, stride of activation]
  // Gradients of the activations of the same name; may share their memory once those are dead.
  T *qkv, *gate_up, *sequence_gate_up;
  // Sums over the sequence, f32, null where the block lacks the weight: of the halves' result norms [stride of u], and
  // as in AttentionGradients.
  float *result_norm1, *result_norm2, *qk_bias, *qk_norm, *decay_bias;
};

template <class T> struct BlockBackwardScratch {
  float* tile;
  AttentionBackwardScratch<T> attention;
  MlpTBackwardScratch<T> mlp_t;

  BlockBackwardScratch(Arena& arena, const BlockShape& block, int length, int rows)
      : tile(arena.take<float>(tile_floats<T>(rows))), attention(arena, block, length), mlp_t(arena, block) {}
};

// f32 of a team, [rows, stride of u] each.
struct RunningGradient {
  float* dy; // of the residual stream
  float* g;  // of a branch alone
};

// sums[s, c] <- sum over the tokens of a sequence of dy[t, c] y[t, c]: the gradient of the weight of a norm whose plain
// output is y.
template <class T>
void norm_weight_gradient(const Team& team, const BlockShape& block, int sequences, int length, const float* dy,
                          const T* y, float* sums) {
  const BlockStrides strides(block);
  const Range range = team.split(ceil_div(block.width, kPanel));
  for (int s = 0; s < sequences; ++s, dy += length * strides.u, y += length * strides.h, sums += strides.u)
    for (int c = range.begin * kPanel; c < smaller(range.end * kPanel, block.width); c += kLanes) {
      const int lanes = smaller(kLanes, block.width - c);
      store(sums + c, sum_over_positions(length, [&](int t) {
              return load_lanes(dy + t * strides.u + c, lanes) * load_lanes(y + t * strides.h + c, lanes);
            }));
    }
}

// The way back out of the residual stream: ds <- gradient of the half's last product, running.dy <- that of its
// residual.  y: the plain output of the half's norm, r its rstd.
template <class T>
void result_backward(const Team& team, const BlockShape& block, int sequences, int length, const float* weight,
                     const T* y, const float* r, const RunningGradient& running, T* ds, float* grad_weight) {
  const BlockStrides strides(block);
  const int D = block.width;
  if (grad_weight) {
    team.begin("norm weight gradient");
    norm_weight_gradient(team, block, sequences, length, running.dy, y, grad_weight);
    team.sync();
  }
  team.begin("norm backward");
  const Range rows = team.split(sequences * length);
  for (int t = rows.begin; t < rows.end; ++t) {
    float *dy = running.dy + t * strides.u, *behind = block.branch_norm ? running.g + t * strides.u : dy;
    T* to = ds + t * strides.h;
    if (weight || block.branch_norm) weigh_row(dy, weight, D, behind);
    if (has_result_norm(block))
      rms_norm_backward(behind, y + t * strides.h, r[t], D, block.eps, to);
    else
      round_row(dy, D, to);
  }
  team.sync();
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

// running.dy += the gradient of what a half's first product reads, from that of its results.
// h: the input of the half, rstd that of the norm on it; null: none.
template <class T>
void input_backward(const Team& team, const BlockShape& block, int rows, const T* grads, long stride, const T* weight,
                    int depth, const T* h, const float* rstd, const RunningGradient& running, float* tile) {
  const BlockStrides strides(block);
  gemm(team, grads, stride, rows, weight, depth, block.width, tile, [&](int row, int n, int panel, const float* in) {
    if (rstd)
      for_rows(row, n, in,
               [&](int t, const float* from) { store_group(from, running.g + t * strides.u + panel * kPanel); });
    else
      add_tile(row, n, panel, block.width, in, running.dy, strides.u);
  });
  team.sync();
  if (!rstd) return;
  team.begin("norm backward");
  const Range range = team.split(rows);
  for (int t = range.begin; t < range.end; ++t)
    input_norm_backward(running.g + t * strides.u, h + t * strides.h, rstd[t], block.width, block.eps,
                        running.dy + t * strides.u);
  team.sync();
}

// The epilogue of the product with W_down: grad_gate_up <- gradient of gate and up, times the row's rstd; the tile is
// the gradient of 32 columns of the activation, two groups of gate_up, or one without a gate.
template <class T>
TRMFAST_INLINE void backward_gates(const BlockShape& block, int row, int rows, int panel, const float* tile,
                                   const T* gate_up, T* grad_gate_up, long stride) {
  const GateLayout gates(block);
  const int columns = gates.columns();
  for_rows(row, rows, tile, [&](int t, const float* in) {
    if (!gates.has_gate) {
      for (int j = 0; j < kPanel; j += kLanes) {
        const long at = t * stride + panel * kPanel + j;
        store(grad_gate_up + at, activate_backward<T>(block.activation, load(gate_up + at), load(in + j)));
      }
      return;
    }
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

// running.dy: gradient of the block's output on entry, of its input on return.  out: the block's output.
// grad_mixed: [rows, stride of mixed], scratch of the team.
template <class T>
void block_backward(const Team& team, const BlockShape& block, const BackwardWeights<T>& weights,
                    const Positions& positions, int sequences, int length, const BlockActivations<T>& act, const T* out,
                    const RunningGradient& running, const BlockGradients<T>& grads, T* grad_mixed,
                    const BlockBackwardScratch<T>& scratch) {
  const BlockStrides strides(block);
  const HeadLayout heads(block);
  const GateLayout gates(block);
  const BlockVectors& vectors = weights.vectors;
  const int D = block.width, rows = sequences * length;

  result_backward(team, block, sequences, length, vectors.result_norm[1], keeps_normed(block) ? act.normed2 : out,
                  act.rstd2, running, grads.ds2, grads.result_norm2);
  team.begin("down backward");
  if (block.conv_taps) {
    gemm(team, grads.ds2, strides.h, rows, weights.down, D, gates.activation_columns(), scratch.tile,
         [&](int row, int n, int panel, const float* tile) {
           silu_rows_backward(row, n, panel, tile, block.conv_taps, length, weights.conv, act.activation, grads.dconv,
                              strides.activation);
         });
    team.sync();
    team.begin("convolution backward");
    gate_rows_backward(team, block, weights.conv, rows, length, grads.dconv, strides.activation, act.input_rstd2,
                       act.gate_up, grads.gate_up, strides.gate_up);
  } else {
    gemm(team, grads.ds2, strides.h, rows, weights.down, D, gates.activation_columns(), scratch.tile,
         scaled(act.input_rstd2, [&](int row, int n, int panel, const float* tile) {
           backward_gates(block, row, n, panel, tile, act.gate_up, grads.gate_up, strides.gate_up);
         }));
  }
  team.sync();
  team.begin("gate and up backward");
  input_backward(team, block, rows, grads.gate_up, strides.gate_up, weights.gate_up, gates.columns(), act.h1,
                 act.input_rstd2, running, scratch.tile);
  if (!block.attention) {
    team.begin("mlp_t backward");
    mlp_t_backward(team, block, weights.seq_gate_up, weights.seq_down, sequences, act.h1, strides.h, running.dy,
                   strides.u, grads.ds1, act.mlp_t, grads.sequence_gate_up, scratch.mlp_t);
    team.sync();
    return;
  }
  result_backward(team, block, sequences, length, vectors.result_norm[0], keeps_normed(block) ? act.normed1 : act.h1,
                  act.rstd1, running, grads.ds1, grads.result_norm1);
  team.begin("attention output backward");
  gemm(team, grads.ds1, strides.h, rows, weights.output, D, heads.output_columns(), scratch.tile,
       [&](int row, int n, int panel, const float* tile) {
         for_rows(row, n, tile,
                  [&](int t, const float* in) { store_group(in, grad_mixed + t * strides.mixed + panel * kPanel); });
       });
  team.sync();
  team.begin("attention backward");
  for (int s = 0; s < sequences; ++s) {
    const long first = static_cast<long>(s) * length;
    const AttentionGradients<T> into = {
        grads.qkv + first * strides.qkv, act.input_rstd1 ? act.input_rstd1 + first : nullptr,
        grads.qk_bias ? grads.qk_bias + static_cast<long>(s) * heads.value(0) : nullptr,
        grads.qk_norm ? grads.qk_norm + s * 2L * heads.kv_heads * heads.qk_width : nullptr,
        grads.decay_bias ? grads.decay_bias + static_cast<long>(s) * heads.decays : nullptr};
    attention_backward(team, block, vectors, positions.of(s, length), length, act.qkv + first * strides.qkv, into,
                       strides.qkv, act.mixed + first * strides.mixed, grad_mixed + first * strides.mixed,
                       strides.mixed, scratch.attention);
  }
  team.sync();
  team.begin("qkv backward");
  input_backward(team, block, rows, grads.qkv, strides.qkv, weights.qkv, heads.columns(), act.h, act.input_rstd1,
                 running, scratch.tile);
}

} // namespace TRMFAST_NAMESPACE
} // namespace trmfast
