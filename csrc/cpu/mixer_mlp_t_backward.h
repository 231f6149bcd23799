// Gradients of the mlp_t token mixer, by (sequence, panel of 32 channels) as in mixer_mlp_t.h.
#pragma once

#include "mixer_mlp_t.h"
#include "norm.h"
#include "swiglu.h"

namespace trmfast {
namespace TRMFAST_NAMESPACE {

template <class T> struct MlpTBackwardScratch {
  T* grad_sum;   // panel of du, depth L
  T* grad_gates; // panel of the gradients of gate and up, depth 2 x padded seq_inner
  float *tile, *gate, *up;

  MlpTBackwardScratch(Arena& arena, const BlockShape& block)
      : grad_sum(arena.take<T>(panel_elements<T>(block.seq_len))),
        grad_gates(arena.take<T>(2 * panel_elements<T>(block.seq_inner))),
        tile(arena.take<float>(Dot<T>::kRows * kPanel)), gate(arena.take<float>((Dot<T>::kRows + 1) * kPanel)),
        up(arena.take<float>((Dot<T>::kRows + 1) * kPanel)) {}
};

// dy: gradient of h1 on entry, of h on return (f32 [rows, dy_stride]).  du: gradient of the residual sum, kept for the
// weight gradients.  grad_gate_up: gradient of gate and up, maybe in the place of kept.gate_up.  gate_up, down:
// transposed weights.
template <class T>
void mlp_t_backward(const Team& team, const BlockShape& block, const T* gate_up, const T* down, int sequences,
                    const T* h1, long stride, float* dy, long dy_stride, T* du, const MlpTActivations<T>& kept,
                    T* grad_gate_up, const MlpTBackwardScratch<T>& scratch) {
  const int L = block.seq_len, inner = block.seq_inner, panels = ceil_div(block.width, kPanel);
  const int depth = padded_depth<T>(inner);
  const long down_stride = row_stride(L), gates_stride = row_stride(2 * depth);
  const EvenRowTiles features(inner, Dot<T>::kRows);
  const RowTiles<Dot<T>> positions(L);
  const Range items = team.split(sequences * panels);
  for (int item = items.begin; item < items.end; ++item) {
    const int sequence = item / panels, c = item % panels * kPanel, columns = smaller(kPanel, block.width - c);
    const T* y = h1 + static_cast<long>(sequence) * L * stride + c;
    T* sum_grad = du + static_cast<long>(sequence) * L * stride + c;
    float* grad = dy + static_cast<long>(sequence) * L * dy_stride + c;
    for (int j = 0; j < columns; j += kLanes) {
      const int n = smaller(kLanes, columns - j);
      const vf r = load(kept.rstd + static_cast<long>(sequence) * round_up(block.width, kPanel) + c + j);
      const vf dots =
          sum_over_positions(L, [&](int t) { return load(grad + t * dy_stride + j) * load(y + t * stride + j); });
      const vf mean = dots / static_cast<float>(L);
      for (int t = 0; t < L; ++t) {
        const vf dy_t = load(grad + t * dy_stride + j), y_t = load(y + t * stride + j);
        const vf value = L == 1 ? dy_t * (r * one_element_slope(r, y_t, block.eps)) : r * (dy_t - y_t * mean);
        store_lanes(grad + t * dy_stride + j, value, n);
        store_lanes(sum_grad + t * stride + j, value, n);
      }
    }
    pack_rows(sum_grad, stride, L, columns, scratch.grad_sum);

    for (int i = 0; i < features.count; ++i) {
      if (team.stopped()) return;
      const int row = features.begin(i), n = features.size(i);
      multiply(down + row * down_stride, down_stride, scratch.grad_sum, padded_depth<T>(L), n, scratch.tile, kPanel);
      const long at = (static_cast<long>(sequence) * 2 * inner + row) * stride + c;
      const T *gates = kept.gate_up + at, *ups = gates + inner * stride;
      T *grad_gates = grad_gate_up + at, *grad_ups = grad_gates + inner * stride;
      for_rows(0, n, scratch.tile, [&](int r, const float* in) {
        for (int j = 0; j < kPanel; j += kLanes) {
          const GateGradient d =
              swiglu_backward<T>(load(gates + r * stride + j), load(ups + r * stride + j), load(in + j));
          store(scratch.gate + r * kPanel + j, d.gate);
          store(scratch.up + r * kPanel + j, d.up);
          store(grad_gates + r * stride + j, d.gate);
          store(grad_ups + r * stride + j, d.up);
        }
      });
      store_depth_rows(scratch.gate, row, n, inner, scratch.grad_gates);
      store_depth_rows(scratch.up, row, n, inner, scratch.grad_gates + panel_elements<T>(inner));
    }

    for (int i = 0; i < positions.count; ++i) {
      const int row = positions.begin(i), n = positions.size(i), lead = positions.lead(i);
      multiply(gate_up + (row - lead) * gates_stride, gates_stride, scratch.grad_gates, 2 * depth, lead + n,
               scratch.tile, kPanel);
      for_rows(row, n, scratch.tile + lead * kPanel, [&](int t, const float* in) {
        for (int j = 0; j < columns; j += kLanes)
          store_lanes(grad + t * dy_stride + j, load(grad + t * dy_stride + j) + load(in + j),
                      smaller(kLanes, columns - j));
      });
    }
  }
}

} // namespace TRMFAST_NAMESPACE
} // namespace trmfast
