// URM's channel mixer between its two products: a depthwise convolution over the positions of a sequence,
//
//   convolved[l] = silu<T>(bias + sum over taps k of kernel[k] activation[l + k - taps / 2])
//
// with zeros beyond the ends of the sequence.  It runs over whole rows of channels; neighbouring rows are in L1.
#pragma once

#include "swiglu.h"
#include "team.h"
#include "weight_gradient.h"

namespace trmfast {
namespace TRMFAST_NAMESPACE {

// The first and last tap that fall into the sequence for an output at `position`, and the row of the first.
struct TapRange {
  int begin, end, offset;
  TapRange(int taps, int position, int length)
      : begin(larger(0, taps / 2 - position)), end(smaller(taps, length + taps / 2 - position)), offset(-(taps / 2)) {}
};

// Channels c.. of the convolution, before its SiLU; at points to the activation of the output's own row.
template <class T>
TRMFAST_INLINE vf convolve(const T* at, long stride, const ConvWeights<T>& conv, const TapRange& taps, int c) {
  vf sum = load(conv.bias + c);
  for (int k = taps.begin; k < taps.end; ++k)
    sum = fma(load(conv.kernel + k * conv.columns + c), load(at + (k + taps.offset) * stride + c), sum);
  return sum;
}

// convolved <- silu(convolution of activation), [rows, stride] both
template <class T>
void convolve_rows(const Team& team, const BlockShape& block, const ConvWeights<T>& conv, int rows, int length,
                   const T* activation, T* convolved, long stride) {
  const int columns = GateLayout(block).activation_columns();
  const Range range = team.split(rows);
  for (int t = range.begin; t < range.end; ++t) {
    const TapRange taps(block.conv_taps, t % length, length);
    for (int c = 0; c < columns; c += kLanes)
      store(convolved + t * stride + c, silu<T>(convolve(activation + t * stride, stride, conv, taps, c)));
  }
}

// dconv[row, group] <- tile, the gradient of convolved, times the derivative of the SiLU
template <class T>
TRMFAST_INLINE void silu_rows_backward(int row, int rows, int panel, const float* tile, int num_taps, int length,
                                       const ConvWeights<T>& conv, const T* activation, T* dconv, long stride) {
  const int first = panel * kPanel, columns = smaller(kPanel, conv.columns - first);
  for_rows(row, rows, tile, [&](int t, const float* in) {
    const TapRange taps(num_taps, t % length, length);
    for (int j = 0; j < columns; j += kLanes) {
      const vf m = convolve(activation + t * stride, stride, conv, taps, first + j);
      store(dconv + t * stride + first + j, silu_backward<T>(m, load(in + j)));
    }
  });
}

// grad_gate_up <- gradient of gate and up through the transposed convolution of dconv, its rows times `scale` if that
// is not null; it may be gate_up itself
template <class T>
void gate_rows_backward(const Team& team, const BlockShape& block, const ConvWeights<T>& conv, int rows, int length,
                        const T* dconv, long stride, const float* scale, const T* gate_up, T* grad_gate_up,
                        long gates_stride) {
  const int columns = GateLayout(block).activation_columns(), back = block.conv_taps / 2;
  const Range range = team.split(rows);
  for (int t = range.begin; t < range.end; ++t) {
    const int position = t % length;
    // Tap k of output l reads row l + k - back, so row l is read by outputs l + back - k.
    const int begin = larger(0, position + back - length + 1), end = smaller(block.conv_taps, position + back + 1);
    for (int c = 0; c < columns; c += kLanes) {
      vf sum = {};
      for (int k = begin; k < end; ++k)
        sum = fma(load(conv.kernel + k * conv.columns + c), load(dconv + (t + back - k) * stride + c), sum);
      if (scale) sum *= broadcast(scale[t]);
      const long at = t * gates_stride + c / kHalf * kPanel + c % kHalf;
      const GateGradient d = swiglu_backward<T>(load(gate_up + at), load(gate_up + at + kHalf), sum);
      store(grad_gate_up + at, d.gate);
      store(grad_gate_up + at + kHalf, d.up);
    }
  }
}

// kernel[c, k] += sum over tokens of dconv[l, c] activation[l + k - taps / 2, c], bias[c] += sum of dconv[l, c];
// either may be absent.  In strips of 128 channels, so that each thread owns its sums and reads whole cache lines;
// 32 positions of a sequence are summed separately first, as in mixer_mlp_t.h.
template <class T>
void conv_gradient(const Team& team, const BlockShape& block, const T* dconv, const T* activation, long stride,
                   int sequences, int length, const Gradient& kernel, const Gradient& bias) {
  constexpr int kStrip = 128, kChain = 32;
  const int num_taps = block.conv_taps, columns = GateLayout(block).activation_columns();
  const Range strips = team.split(ceil_div(columns, kStrip));
  float total[kMostTaps + 1][kStrip], part[kMostTaps + 1][kStrip]; // the last is the bias
  for (int strip = strips.begin; strip < strips.end; ++strip) {
    const int first = strip * kStrip, n = smaller(kStrip, columns - first);
    const size_t bytes = static_cast<size_t>(num_taps + 1) * sizeof total[0];
    __builtin_memset(total, 0, bytes);
    // fn(gradient, place in it, sum) for the channels of the strip
    const auto for_sums = [&](auto fn) {
      for (int c = 0; c < smaller(n, block.inner - first); ++c) {
        for (int k = 0; k < num_taps && kernel.values; ++k)
          fn(kernel, static_cast<long>(first + c) * num_taps + k, total[k] + c);
        if (bias.values) fn(bias, first + c, total[num_taps] + c);
      }
    };
    for_sums([](const Gradient& grad, long at, float* sum) { *sum = grad.fresh ? 0.0f : grad.values[at]; });
    for (int t = 0; t < sequences * length; ++t) {
      const int position = t % length;
      if (position % kChain == 0) __builtin_memset(part, 0, bytes);
      const TapRange taps(num_taps, position, length);
      for (int c = 0; c < n; c += kLanes) {
        const vf d = load(dconv + t * stride + first + c);
        for (int k = taps.begin; k < taps.end; ++k)
          store(part[k] + c, fma(d, load(activation + (t + k + taps.offset) * stride + first + c), load(part[k] + c)));
        store(part[num_taps] + c, load(part[num_taps] + c) + d);
      }
      if (position % kChain != kChain - 1 && position + 1 < length) continue;
      for (int k = 0; k <= num_taps; ++k)
        for (int c = 0; c < n; c += kLanes) store(total[k] + c, load(total[k] + c) + load(part[k] + c));
    }
    for_sums([](const Gradient& grad, long at, const float* sum) { grad.values[at] = *sum; });
  }
  team.sync();
}

} // namespace TRMFAST_NAMESPACE
} // namespace trmfast
