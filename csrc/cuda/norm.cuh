// Residual and RMSNorm on accumulators that are spread over the warps by output column: u = acc + residual,
// y = u / sqrt(mean(u^2) + eps), which replaces the residual in shared memory.  Sums of squares cross the warps through
// shared memory, [vector][kSumStride], a stride that spreads vectors over the banks.
#pragma once

#include "gemm.cuh"

namespace trmfast {
namespace gpu {

constexpr int kSumStride = kWarps + 4;

template <class T> DEVICE void add_words(float& a, float& b, SharedPtr<const T> residual) {
  const F32x2 x = unpack<T>(load(residual.template as<const uint32_t>()));
  a += x.v[0];
  b += x.v[1];
}

DEVICE float norm_scale(SharedPtr<const float> sums, int vector, int count, float eps) {
  float sum = 0.0f;
  UNROLL
  for (int i = 0; i < kWarps / 4; ++i) {
    const F32x4 part = load((sums + (vector * kSumStride + 4 * i)).as<const F32x4>());
    sum += part.v[0] + part.v[1] + part.v[2] + part.v[3];
  }
  return fast_rsqrt(sum / static_cast<float>(count) + eps);
}

// Straight squares; h: [16 * kRowTiles, stride], with all columns of the squares, zero from `width` on, and so is y.
// sums: f32 [16 * kRowTiles, kSumStride], in memory that other warps may read until they arrive here.
template <class T, int kRowTiles, int kTiles>
DEVICE void norm_rows(float (&acc)[kRowTiles][kTiles][4], SharedPtr<T> h, int stride, int width, float eps,
                      SharedPtr<float> sums) {
  const int lane = lane_index(), g = lane / 4, t = lane % 4, warp = warp_index();
  const SharedPtr<T> own = h + (g * stride + warp * kTiles * 8 + 2 * t);
  float square[kRowTiles][2];
  UNROLL
  for (int r = 0; r < kRowTiles; ++r) {
    UNROLL
    for (int half = 0; half < 2; ++half) {
      float sum = 0.0f;
      UNROLL
      for (int n = 0; n < kTiles; ++n) {
        float& a = acc[r][n][2 * half];
        float& b = acc[r][n][2 * half + 1];
        add_words<T>(a, b, own + ((r * 16 + half * 8) * stride + n * 8));
        sum += a * a + b * b;
      }
      square[r][half] = lanes_sum<4>(sum);
    }
  }
  block_sync(); // the memory of `sums` is free
  UNROLL
  for (int r = 0; r < kRowTiles; ++r) {
    UNROLL
    for (int half = 0; half < 2; ++half) {
      if (t == 0) store(sums + ((r * 16 + half * 8 + g) * kSumStride + warp), square[r][half]);
    }
  }
  block_sync();
  UNROLL
  for (int r = 0; r < kRowTiles; ++r) {
    UNROLL
    for (int half = 0; half < 2; ++half) {
      const float scale = norm_scale(sums, r * 16 + half * 8 + g, width, eps);
      UNROLL
      for (int n = 0; n < kTiles; ++n) {
        const uint32_t y = pack<T>(acc[r][n][2 * half] * scale, acc[r][n][2 * half + 1] * scale);
        store((own + ((r * 16 + half * 8) * stride + n * 8)).template as<uint32_t>(), y);
      }
    }
  }
  block_sync();
}

// Transposed squares: output columns are tokens, the rows are channels.  strip: [tokens, stride], with all tokens of
// the squares, zero from `length` on.  sums: f32 [16 * kRowTiles, kSumStride], as above.
template <class T, int kRowTiles, int kTiles>
DEVICE void norm_columns(float (&acc)[kRowTiles][kTiles][4], SharedPtr<T> strip, int stride, int length, float eps,
                         SharedPtr<float> sums) {
  const int lane = lane_index(), g = lane / 4, t = lane % 4, warp = warp_index();
  const SharedPtr<T> own = strip + ((warp * kTiles * 8 + g) * stride + 2 * t);
  float square[kRowTiles][2][2]; // [row tile][rows 0-7 or 8-15][2t, 2t + 1]
  UNROLL
  for (int r = 0; r < kRowTiles; ++r) {
    UNROLL
    for (int half = 0; half < 2; ++half) {
      float sum[2] = {0.0f, 0.0f};
      UNROLL
      for (int s = 0; s < kTiles; ++s) { // 8 tokens: s / 2 is the square, s % 2 the half of its columns
        float* u = acc[r][s / 2 * 2 + half] + s % 2 * 2;
        add_words<T>(u[0], u[1], own + (s * 8 * stride + r * 16 + half * 8));
        sum[0] += u[0] * u[0];
        sum[1] += u[1] * u[1];
      }
      UNROLL
      for (int i = 0; i < 2; ++i) {
        UNROLL
        for (int mask = 4; mask < kWarpSize; mask *= 2) sum[i] += shuffle_xor(sum[i], mask);
        square[r][half][i] = sum[i];
      }
    }
  }
  block_sync();
  UNROLL
  for (int r = 0; r < kRowTiles; ++r) {
    UNROLL
    for (int i = 0; i < 4; ++i) {
      if (g == 0) store(sums + ((r * 16 + i / 2 * 8 + 2 * t + i % 2) * kSumStride + warp), square[r][i / 2][i % 2]);
    }
  }
  block_sync();
  UNROLL
  for (int r = 0; r < kRowTiles; ++r) {
    UNROLL
    for (int half = 0; half < 2; ++half) {
      const int channel = r * 16 + half * 8 + 2 * t;
      const float scale0 = norm_scale(sums, channel, length, eps), scale1 = norm_scale(sums, channel + 1, length, eps);
      UNROLL
      for (int s = 0; s < kTiles; ++s) {
        const float* u = acc[r][s / 2 * 2 + half] + s % 2 * 2;
        store((own + (s * 8 * stride + r * 16 + half * 8)).template as<uint32_t>(),
              pack<T>(u[0] * scale0, u[1] * scale1));
      }
    }
  }
  block_sync();
}

} // namespace gpu
} // namespace trmfast
