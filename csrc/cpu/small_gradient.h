// Gradients of the weights of norms and of the bias of queries and keys, f32.
//
// Behind a product a sequence leaves its sums in its slot, and the slots are added up in order.  The weight of a norm
// before a product is part of the packed product: the gradient of that product gives both.
#pragma once

#include "block_backward.h"
#include "weight_gradient.h"

namespace trmfast {
namespace TRMFAST_NAMESPACE {

// grad[channel(c)] += sums[row, c] over the rows, in order; a channel may be -1.  sums: [rows, stride].
template <class Channel>
void vector_gradient(const Team& team, const float* sums, long stride, int rows, int columns, const Gradient& grad,
                     Channel channel) {
  const Range range = team.split(columns);
  for (int c = range.begin; c < range.end; ++c) {
    if (channel(c) < 0) continue;
    float total = grad.fresh ? 0.0f : grad.values[channel(c)];
    for (int row = 0; row < rows; ++row) total += sums[row * stride + c];
    grad.values[channel(c)] = total;
  }
  team.sync();
}

// grad: the gradient of w [outputs, inputs] times a norm's weight [inputs], which becomes that of w.  grad_norm, if not
// null, <- that of the norm's weight, the sum over outputs of grad * w; 32 of them are summed separately first.
inline void split_norm_gradient(const Team& team, int outputs, int inputs, const float* w, const float* norm,
                                float* grad, float* grad_norm) {
  constexpr int kStrip = 128, kChain = 32;
  const Range strips = team.split(ceil_div(inputs, kStrip));
  float total[kStrip], part[kStrip];
  for (int strip = strips.begin; strip < strips.end; ++strip) {
    const int first = strip * kStrip, n = smaller(kStrip, inputs - first);
    __builtin_memset(total, 0, sizeof total);
    for (int row = 0; row < outputs; row += kChain) {
      __builtin_memset(part, 0, sizeof part);
      for (int r = row; r < smaller(outputs, row + kChain); ++r)
        for (int c = 0; c < n; c += kLanes) {
          const int lanes = smaller(kLanes, n - c);
          const long at = static_cast<long>(r) * inputs + first + c;
          const vf g = load_lanes(grad + at, lanes);
          store(part + c, fma(g, load_lanes(w + at, lanes), load(part + c)));
          store_lanes(grad + at, g * load_lanes(norm + first + c, lanes), lanes);
        }
      for (int c = 0; c < kStrip; c += kLanes) store(total + c, load(total + c) + load(part + c));
    }
    for (int c = 0; c < n && grad_norm; ++c) grad_norm[first + c] = total[c];
  }
}

// The small weights of one layer, whose sums over each of `used` slots begin at `grads`.  into: the layer's gradients.
template <class T>
void add_vector_gradients(const Team& all, const BlockShape& block, const BlockGradients<T>& grads, int used,
                          float* const* into, bool fresh) {
  const WeightPlaces places(block);
  const HeadLayout heads(block);
  const auto add = [&](int place, const float* sums, long stride, int rows, int columns, auto channel) {
    if (place >= 0 && into[place]) vector_gradient(all, sums, stride, rows, columns, {into[place], fresh}, channel);
  };
  const auto same = [](int c) { return c; };
  const auto of_head = [&](int c) { return heads.qk_channel(c); };
  const long width = BlockStrides(block).u;
  add(places.result_norm[0], grads.result_norm1, width, used, block.width, same);
  add(places.result_norm[1], grads.result_norm2, width, used, block.width, same);
  add(places.decay_bias, grads.decay_bias, heads.decays, used, heads.decays, same);
  add(places.qk_bias, grads.qk_bias, heads.value(0), used, heads.value(0), [&](int c) { return heads.qk_index(c); });
  // A slot holds a row for the queries and one for the keys of every head of keys.
  const int qk = heads.qk_width;
  add(places.q_norm, grads.qk_norm, 2L * qk, used * heads.kv_heads, qk, of_head);
  add(places.k_norm, grads.qk_norm + qk, 2L * qk, used * heads.kv_heads, qk, of_head);
}

// Where norms with learned weights stand before products, the gradients of a net that was `summed` are so far those of
// the packed weights.
inline void split_norm_gradients(const Team& all, const BackwardJob& backward, const bool* summed) {
  const Job& job = backward.job;
  const BlockShape& block = job.nets[0].block;
  const WeightPlaces places(block);
  const HeadLayout heads(block);
  if (!block.input_norm || !block.norm_weight) return;
  all.begin("norm weight gradient");
  float* const* into = backward.grad_weights;
  const float* const* weights = backward.weights;
  const auto split = [&](int product, int outputs, int norm) {
    if (into[product])
      split_norm_gradient(all, outputs, block.width, weights[product], weights[norm], into[product], into[norm]);
  };
  for (int n = 0; n < job.num_nets; into += net_weights(job.nets[n]), weights += net_weights(job.nets[n]), ++n) {
    if (!summed[n]) continue;
    for (int layer = 0; layer < job.nets[n].layers; ++layer) {
      const int at = layer * block_weights(block);
      split(at + places.mixer_in, heads.qkv_rows(), at + places.input_norm[0]);
      split(at + places.up, GateLayout(block).rows(), at + places.input_norm[1]);
    }
  }
}

} // namespace TRMFAST_NAMESPACE
} // namespace trmfast
