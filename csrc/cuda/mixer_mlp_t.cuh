// The SwiGLU over the sequence axis.  It mixes tokens and leaves channels alone, so for it the group divides channels
// where it divided tokens:
//
//   own tokens of h -> exchange       | group barrier
//   for each own strip of 16 * kStripTiles channels, all tokens:
//       strip [L, channels] -> SwiGLU over L, residual, norm over L -> exchange
//   own tokens <- exchange            | after a second group barrier
//
// Exchange of a group: [h, h1][L, D].  A CTA that is ahead writes h of the next layer only after the second barrier,
// when nobody reads h, and h1 only after the first, when nobody reads h1: one copy of each is enough.
// The strip is stored by depth [token][channel]; products are transposed, so that a thread holds neighbouring channels.
#pragma once

#include "norm.cuh"
#include "rows.cuh"
#include "swiglu.cuh"

namespace trmfast {
namespace gpu {

// Strips of a group are dealt to its CTAs in turn: how many this one has.
template <int kStripTiles> DEVICE int own_strips(int width, int rank, int group_blocks) {
  const int strips = ceil_div(width, 16 * kStripTiles);
  return rank < strips ? ceil_div(strips - rank, group_blocks) : 0;
}

// h1 = norm(h + mlp_t(h)) over tokens, in place.  shared: the CTA's shared memory from h on, which the strip takes
// over. False: a barrier timed out.
template <int kTokenTiles, int kStripTiles, class T, int kStages, class Barrier>
DEVICE bool sequence_mixer(const ForwardParams<T>& p, SharedPtr<T> shared, const OwnRows& rows, GlobalPtr<T> exchange,
                           int rank, WeightStream<T, kStages>& stream, Barrier&& barrier) {
  constexpr int kChannels = 16 * kStripTiles, kStride = kChannels + kPad;
  const LayerLayout& layout = p.layout;
  const int width = layout.block.width, length = p.length, padded = 16 * layout.token_steps;
  const SharedPtr<T> strip = shared, chunks = shared + padded * kStride;
  const GlobalPtr<T> mixed = exchange + static_cast<int64_t>(length) * width;

  rows.store_to(exchange, SharedPtr<const T>(shared));
  if (!barrier()) return false;
  NO_UNROLL
  for (int channel0 = rank * kChannels; channel0 < width; channel0 += p.group_blocks * kChannels) {
    copy_in(strip, kStride, padded, kChannels, GlobalPtr<const T>(exchange + channel0), width, length,
            smaller(kChannels, width - channel0));
    block_sync();
    float acc[kStripTiles][kTokenTiles][4];
    swiglu<Order::kTransposed>(acc, SharedPtr<const T>(strip), kStride, layout.token_steps, layout.seq_passes, chunks,
                               stream);
    norm_columns(acc, strip, kStride, length, layout.block.eps, chunks.template as<float>());
    copy_out(mixed + channel0, width, length, smaller(kChannels, width - channel0), SharedPtr<const T>(strip), kStride);
  }
  if (!barrier()) return false;
  rows.load_from(GlobalPtr<const T>(mixed), shared);
  block_sync();
  return true;
}

} // namespace gpu
} // namespace trmfast
