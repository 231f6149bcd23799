// down(silu(gate) * up) with the activation kept on chip.  A pass computes kPassInner = 128 inner channels,
// 16 a warp: gate/up into registers, silu(gate) * up into a chunk in shared memory, and the chunk times W_down into the
// accumulators of the output.  Chunks alternate between two places, so one barrier per pass is enough: a warp that
// overwrites one has passed the barrier that all warps reach after reading it.
#pragma once

#include "gemm.cuh"

namespace trmfast {
namespace gpu {

DEVICE float silu_times(float gate, float up) { return gate * fast_rcp(1.0f + fast_exp2(gate * -1.44269504f)) * up; }

template <class T> DEVICE uint32_t silu_times_words(const float* gate, const float* up) {
  return pack<T>(silu_times(gate[0], up[0]), silu_times(gate[1], up[1]));
}

// Elements of the two chunks.
template <Order kOrder> TRMFAST_BOTH constexpr int chunk_elements(int rows) {
  return 2 * (kOrder == Order::kStraight ? rows * (kPassInner + kPad) : kPassInner * (rows + kPad));
}

// acc = SwiGLU of rows [16 * kRowTiles, 16 * steps].  Straight: rows and chunks by row; transposed: both by depth.
template <Order kOrder, class T, int kStages, int kRowTiles, int kTiles>
DEVICE void swiglu(float (&acc)[kRowTiles][kTiles][4], SharedPtr<const T> rows, int stride, int steps, int passes,
                   SharedPtr<T> chunks, WeightStream<T, kStages>& stream) {
  constexpr Storage kStorage = kOrder == Order::kStraight ? Storage::kByRow : Storage::kByDepth;
  constexpr int kStride = kOrder == Order::kStraight ? kPassInner + kPad : 16 * kRowTiles + kPad;
  const int lane = lane_index(), g = lane / 4, t = lane % 4, inner0 = warp_index() * 16;
  clear(acc);
  NO_UNROLL
  for (int pass = 0; pass < passes; ++pass) {
    const SharedPtr<T> chunk = chunks + pass % 2 * (chunk_elements<kOrder>(16 * kRowTiles) / 2);
    float gate_up[kRowTiles][4][4];
    clear(gate_up);
    multiply<kOrder, kStorage>(gate_up, rows, stride, steps, stream);
    UNROLL
    for (int r = 0; r < kRowTiles; ++r) {
      UNROLL
      for (int s = 0; s < 2; ++s) {
        UNROLL
        for (int half = 0; half < 2; ++half) {
          if constexpr (kOrder == Order::kStraight) { // tile 2s: gate, 2s + 1: up; halves of a fragment: rows g, g + 8
            const uint32_t y = silu_times_words<T>(gate_up[r][2 * s] + 2 * half, gate_up[r][2 * s + 1] + 2 * half);
            const SharedPtr<T> to = chunk + ((r * 16 + half * 8 + g) * kStride + inner0 + s * 8 + 2 * t);
            store(to.template as<uint32_t>(), y);
          } else { // halves of a fragment: gate, up
            const uint32_t y = silu_times_words<T>(gate_up[r][2 * s + half], gate_up[r][2 * s + half] + 2);
            const SharedPtr<T> to = chunk + ((inner0 + s * 8 + g) * kStride + r * 16 + half * 8 + 2 * t);
            store(to.template as<uint32_t>(), y);
          }
        }
      }
    }
    block_sync();
    multiply<kOrder, kStorage>(acc, SharedPtr<const T>(chunk), kStride, kPassInner / 16, stream);
  }
}

} // namespace gpu
} // namespace trmfast
