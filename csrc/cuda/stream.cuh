// The weights of the whole program as one stream per warp: a ring of kStages stages in shared memory that belongs to
// the warp alone, so that warps wait for each other only where activations change hands, and filled by cp.async up to
// kStages - 1 stages ahead, across products, layers, updates and sequences.
//
// Hazards, both covered by the one sync_warp of next(): the copies of a stage were issued by all lanes of the warp, and
// the stage that is overwritten is the one that the previous next() returned.  No other cp.async may be issued by a
// kernel that has a stream: the groups are counted.
#pragma once

#include "params.cuh"

namespace trmfast {
namespace gpu {

template <class T, int kStages> class WeightStream {
public:
  static constexpr int kBytes = kWarps * kStages * kStageElements * static_cast<int>(sizeof(T)); // of shared memory

  // sequences: how many this CTA takes part in; token_repeats: how often it reads the part of a layer over tokens.
  DEVICE WeightStream(const ForwardParams<T>& params, SharedPtr<T> ring, int sequences, int token_repeats)
      : params_(params), ring_(ring + (warp_index() * kStages * kStageElements + lane_index() * 8)),
        sequences_(sequences), token_repeats_(token_repeats) {
    UNROLL
    for (int stage = 0; stage < kStages - 1; ++stage) fill(stage);
  }

  // The next stage of this warp, at the address that the lane passes to ldmatrix_x4 for the first square.  It may be
  // read until the call after.
  DEVICE SharedPtr<const T> next() {
    cp_async_wait<kStages - 2>();
    sync_warp();
    fill(last_);
    last_ = last_ == kStages - 1 ? 0 : last_ + 1;
    return ring_ + last_ * kStageElements;
  }

  // Before the kernel returns early.
  DEVICE void drain() { cp_async_wait<0>(); }

private:
  DEVICE void fill(int stage) {
    if (left_ == 0) open();
    if (left_ > 0) {
      const SharedPtr<T> to = ring_ + stage * kStageElements;
      cp_async_16(to, from_);
      cp_async_16(to + kSquare, from_ + kSquare);
      from_ = from_ + kWarps * kStageElements;
      --left_;
    }
    cp_async_commit();
  }

  // Goes to the next run of contiguous stages: the part over tokens as often as asked, then the rest of the layer.
  DEVICE void open() {
    if (sequences_ == 0) {
      left_ = -1;
      return;
    }
    const LayerLayout& layout = params_.layout;
    const int net = PackedUpdate(load_nc(params_.updates + update_)).net();
    const bool over_tokens = part_ < token_repeats_;
    const int first = over_tokens ? 0 : layout.token_stages;
    left_ = over_tokens ? layout.token_stages : layout.stages - layout.token_stages;
    const int64_t at = (static_cast<int64_t>(layer_) * layout.stages + first) * kWarps * kStageElements;
    from_ = params_.weights[net] + (at + warp_index() * kStageElements + lane_index() * 8);
    if (over_tokens) {
      ++part_;
      return;
    }
    part_ = 0;
    if (++layer_ < params_.layers[net]) return;
    layer_ = 0;
    if (++update_ < params_.num_updates) return;
    update_ = 0;
    --sequences_;
  }

  const ForwardParams<T>& params_;
  SharedPtr<T> ring_;
  GlobalPtr<const T> from_{nullptr};
  int left_ = 0;
  int last_ = kStages - 1;
  int sequences_, token_repeats_;
  int update_ = 0, layer_ = 0, part_ = 0;
};

} // namespace gpu
} // namespace trmfast
