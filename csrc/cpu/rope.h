// Rotary position embedding in packed order: a group of 32 columns is 16 channels a of a head's first half and their
// partners b of the second half, so a rotation needs nothing outside the group.
#pragma once

#include "layout.h"
#include "simd.h"

namespace trmfast {
namespace TRMFAST_NAMESPACE {

// Tables [L, qk_width] in packed order; null: no rotation.
struct Rope {
  const float* cos;
  const float* sin;
  int width;
};

inline void pack_rope_table(const float* table, const HeadLayout& heads, int length, float* packed) {
  for (int t = 0; t < length; ++t)
    for (int c = 0; c < heads.qk_width; ++c) {
      const int channel = heads.qk_channel(c);
      packed[static_cast<long>(t) * heads.qk_width + c] =
          channel < 0 ? 0.0f : table[static_cast<long>(t) * heads.head_dim + channel];
    }
}

// (a, b) <- (a cos_a - b sin_a, b cos_b + a sin_b)
template <class T> TRMFAST_INLINE void rotate(const float* in, const float* cos, const float* sin, T* out) {
  for (int j = 0; j < kHalf; j += kLanes) {
    const vf a = load(in + j), b = load(in + kHalf + j);
    store(out + j, a * load(cos + j) - b * load(sin + j));
    store(out + kHalf + j, b * load(cos + kHalf + j) + a * load(sin + kHalf + j));
  }
}

// The transpose of rotate(): gradients of (a, b).
template <class T> TRMFAST_INLINE void rotate_transposed(const float* in, const float* cos, const float* sin, T* out) {
  for (int j = 0; j < kHalf; j += kLanes) {
    const vf a = load(in + j), b = load(in + kHalf + j);
    store(out + j, a * load(cos + j) + b * load(sin + kHalf + j));
    store(out + kHalf + j, b * load(cos + kHalf + j) - a * load(sin + j));
  }
}

template <class T> TRMFAST_INLINE void store_group(const float* in, T* out) {
  for (int j = 0; j < kPanel; j += kLanes) store(out + j, load(in + j));
}

} // namespace TRMFAST_NAMESPACE
} // namespace trmfast
