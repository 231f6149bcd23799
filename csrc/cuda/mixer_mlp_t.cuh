// The SwiGLU over the sequence axis.  It mixes tokens but not channels, so the blocks of a group
// split channels instead of tokens:
//
//   own tokens of h -> exchange       | group barrier
//   for each own strip of 16 * kStripTiles channels, all tokens:
//       strip [L, channels] -> SwiGLU over L, residual, norm over L -> exchange
//   own tokens <- exchange            | after a second group barrier
//
// Exchange of a group: [h, h1][L, D].  A CTA that is ahead writes the next layer's h only after the second barrier,
// when no CTA reads h, and h1 only after the first, when none reads h1: one copy of each is enough.
// The strip is stored by depth [token][channel]; products are transposed, so that a thread holds neighbouring channels.
#pragma once

#include "group.cuh"
#include "norm.cuh"
#include "rows.cuh"
#include "swiglu.cuh"

namespace trmfast {
namespace gpu {

// h1 = norm(h + mlp_t(h)) over tokens, in place.  shared: the CTA's shared memory starting at h, which the strip
// overwrites; layers_done: by this kernel so far.  False: a barrier of the group timed out.
template <class I, class T, int kStages>
DEVICE bool mlp_t(const ForwardParams<T>& p, SharedPtr<T> shared, int layers_done, WeightStream<T, kStages>& stream) {
  constexpr int kChannels = 16 * I::kStripTiles, kLanes = kChannels / 8, kStride = kChannels + kPad;
  constexpr int kTokens = 8 * kWarps * I::kTokenTiles;
  const LayerLayout& layout = p.layout;
  const int width = layout.block.width, length = p.length;
  const SharedPtr<T> strip = shared, chunks = shared + kTokens * kStride;
  const GlobalPtr<T> before = exchange_of_group(p), after = before + static_cast<int64_t>(length) * width;

  OwnRows<I>(p).store_to(before, SharedPtr<const T>(shared));
  if (!wait_for_group(p, 2 * layers_done + 1)) return false;
  NO_UNROLL
  for (int channel0 = Place::get().rank * kChannels; channel0 < width; channel0 += p.group_blocks * kChannels) {
    const int channels = smaller(kChannels, width - channel0);
    copy_in<kLanes>(strip, kStride, kTokens, kChannels, GlobalPtr<const T>(before + channel0), width, length, channels);
    block_sync();
    float acc[I::kStripTiles][I::kTokenTiles][4];
    swiglu<Order::kTransposed>(acc, SharedPtr<const T>(strip), kStride, layout.token_steps, layout.seq_passes, chunks,
                               stream);
    norm_columns(acc, strip, kStride, length, layout.block.eps, chunks.template as<float>());
    copy_out<kLanes>(after + channel0, width, length, channels, SharedPtr<const T>(strip), kStride);
  }
  if (!wait_for_group(p, 2 * layers_done + 2)) return false;
  OwnRows<I>(p).load_from(GlobalPtr<const T>(after), shared);
  block_sync();
  return true;
}

} // namespace gpu
} // namespace trmfast
