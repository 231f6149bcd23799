// How the sum s of an update's sources enters a net, with x if the update injects it:
//
//   add        h = s + x, which sum_sources() leaves
//   diagonal   h = w * s + x
//   linear     h = W s + x
//
// Without sources h is x.  A weight's gradient is made of s and the gradient of h, so backward reads both; it computes
// h again from s and x.
#pragma once

#include "block_backward.h"

namespace trmfast {
namespace TRMFAST_NAMESPACE {

// The weight of a net's injection, which is last in both packs; null where there is none.
template <class T> struct InjectionWeights {
  float* diagonal = nullptr; // [width], padded with zeros
  T* linear = nullptr;       // panels of W^T, of W in a backward pack

  InjectionWeights(Arena& arena, const NetShape& net) {
    const int D = net.block.width;
    if (net.injection == Injection::diagonal) diagonal = arena.take<float>(round_up(D, kPanel));
    if (net.injection == Injection::linear) linear = arena.take<T>(packed_elements<T>(D, D));
  }
};

// Weights: ForwardWeights<T> or BackwardWeights<T>.
template <class T, class Weights> InjectionWeights<T> injection_weights(const NetShape& net, const void* packed) {
  Arena arena(const_cast<void*>(packed));
  for (int layer = 0; layer < net.layers; ++layer) Weights(arena, net.block);
  take_final_norm(arena, net);
  return InjectionWeights<T>(arena, net);
}

template <class T>
void pack_injection(const NetShape& net, const float* weight, bool backward, const InjectionWeights<T>& to,
                    PackTurn& turn) {
  const int D = net.block.width;
  const auto same = [](int n) { return n; };
  if (to.diagonal && turn.mine()) pack_channels(weight, D, to.diagonal);
  if (to.linear && backward) pack_weight_rows(weight, nullptr, D, D, to.linear, turn, same);
  if (to.linear && !backward) pack_weight_transposed(weight, nullptr, D, D, to.linear, turn, same);
}

// h <- the input of a net.  total: s, [rows, stride of h], zeros without sources; x: [rows, width], or null where the
// update does not inject it.
template <class T>
void inject(const Team& team, const NetShape& net, const InjectionWeights<T>& weights, bool sources, const T* total,
            const T* x, int rows, T* h, float* tile) {
  const long stride = BlockStrides(net.block).h;
  const int D = net.block.width;
  team.begin("injection");
  if (weights.linear && sources) {
    gemm(team, total, stride, rows, weights.linear, D, D, tile, [&](int row, int n, int panel, const float* values) {
      const int c = panel * kPanel, columns = smaller(kPanel, D - c);
      for_rows(row, n, values, [&](int t, const float* in) {
        for (int j = 0; j < columns; j += kLanes) {
          const int lanes = smaller(kLanes, columns - j);
          vf sum = load(in + j);
          if (x) sum += load_lanes(x + static_cast<long>(t) * D + c + j, lanes);
          store_lanes(h + t * stride + c + j, sum, lanes);
        }
      });
    });
  } else {
    const Range range = team.split(rows);
    for (int t = range.begin; t < range.end; ++t)
      for (int j = 0; j < D; j += kLanes) {
        const int lanes = smaller(kLanes, D - j);
        vf sum = x ? load_lanes(x + static_cast<long>(t) * D + j, lanes) : vf{};
        if (sources) sum = fma(load_lanes(total + t * stride + j, lanes), load(weights.diagonal + j), sum);
        store_lanes(h + t * stride + j, sum, lanes);
      }
  }
  team.sync();
}

// What the gradient of an injection's weight is made of, for the sequences of a team; null where it has none.
template <class T> struct InjectionGradients {
  T* dh = nullptr;       // linear: the gradient of h, [rows, stride of h]
  float* sums = nullptr; // diagonal: its products with s, summed over each sequence, [sequences, stride of u]
};

// The gradient of s from dh, that of h, [rows, stride of u]: `add(t, c, lanes, values)` takes `lanes` columns from c of
// row t.  An update without sources leaves zeros for the weight.
template <class T, class Add>
void injection_backward(const Team& team, const NetShape& net, const InjectionWeights<T>& weights, bool sources,
                        int sequences, int length, const T* total, const float* dh, const InjectionGradients<T>& grads,
                        float* tile, Add&& add) {
  const BlockStrides strides(net.block);
  const int D = net.block.width, rows = sequences * length;
  const Range range = team.split(rows);
  if (weights.linear) {
    for (int t = range.begin; t < range.end; ++t) {
      if (sources)
        round_row(dh + t * strides.u, D, grads.dh + t * strides.h);
      else
        __builtin_memset(static_cast<void*>(grads.dh + t * strides.h), 0, sizeof(T) * static_cast<size_t>(D));
    }
    team.sync();
    if (!sources) return;
    gemm(team, grads.dh, strides.h, rows, weights.linear, D, D, tile,
         [&](int row, int n, int panel, const float* values) {
           const int c = panel * kPanel, columns = smaller(kPanel, D - c);
           for_rows(row, n, values, [&](int t, const float* in) {
             for (int j = 0; j < columns; j += kLanes) add(t, c + j, smaller(kLanes, columns - j), load(in + j));
           });
         });
    return;
  }
  if (sources)
    norm_weight_gradient(team, net.block, sequences, length, dh, total, grads.sums);
  else if (team.rank == 0)
    __builtin_memset(grads.sums, 0, sizeof(float) * static_cast<size_t>(sequences) * static_cast<size_t>(strides.u));
  for (int t = range.begin; t < range.end && sources; ++t)
    for (int j = 0; j < D; j += kLanes)
      add(t, j, smaller(kLanes, D - j), load(dh + t * strides.u + j) * load(weights.diagonal + j));
}

} // namespace TRMFAST_NAMESPACE
} // namespace trmfast
