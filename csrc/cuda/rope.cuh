// RoPE in the rotate-half convention on a straight square: columns 0-7 are channels of the first half of a head,
// columns 8-15 their partners, so a thread holds both.
#pragma once

#include "gemm.cuh"

namespace trmfast {
namespace gpu {

// low, high: channels `pair`, `pair` + 1 and their partners, of rows `row` (elements 0, 1) and row + 8 (2, 3). Channels
// beyond the head are zero and stay so.
template <class T>
DEVICE void rotate(float (&low)[4], float (&high)[4], const ForwardParams<T>& p, int row, int pair) {
  const int head_dim = p.layout.block.head_dim, half = head_dim / 2;
  if (!p.cos || pair >= half) return;
  UNROLL
  for (int i = 0; i < 2; ++i) {
    const int at = smaller(row + 8 * i, p.length - 1) * head_dim + pair;
    const F32x2 cos_low = load_nc((p.cos + at).template as<const F32x2>());
    const F32x2 sin_low = load_nc((p.sin + at).template as<const F32x2>());
    const F32x2 cos_high = load_nc((p.cos + at + half).template as<const F32x2>());
    const F32x2 sin_high = load_nc((p.sin + at + half).template as<const F32x2>());
    UNROLL
    for (int j = 0; j < 2; ++j) {
      const float a = low[2 * i + j], b = high[2 * i + j];
      low[2 * i + j] = a * cos_low.v[j] - b * sin_low.v[j];
      high[2 * i + j] = b * cos_high.v[j] + a * sin_high.v[j];
    }
  }
}

} // namespace gpu
} // namespace trmfast
