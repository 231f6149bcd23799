// The weights of the whole program as one stream per warp: a private ring of kStages stages in shared
// memory, so warps wait for each other only to pass activations.  cp.async fills it up to kStages - 1 stages ahead,
// across products, layers, updates and sequences.
//
// Hazards, both covered by the one sync_warp of next(): all lanes of the warp issued the copies of a stage, and
// the stage being overwritten is the one that the previous next() returned.  A kernel with a stream must issue no other
// cp.async: the groups are counted.
//
// The order is a list of runs of contiguous stages, built by the launcher (add_runs in launch_shape.h).
#pragma once

#include "group.cuh"

namespace trmfast {
namespace gpu {

template <class T, int kStages> class WeightStream {
public:
  static constexpr int kElements = kWarps * kStages * kStageElements; // of shared memory

  DEVICE WeightStream(const ForwardParams<T>& params, SharedPtr<T> ring)
      : params_(params), ring_(ring + (warp_index() * kStages * kStageElements + lane_index() * 8)) {
    UNROLL
    for (int stage = 0; stage < kStages - 1; ++stage) fill(stage);
  }

  // The next stage of this warp, at the address that the lane passes to ldmatrix_x4 for the first square.  Valid until
  // the next call.
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

  // Advances to this CTA's next run.
  DEVICE void open() {
    const Place place = Place::get();
    U32x4 run;
    do {
      if (run_ == place.sequences * params_.num_runs) {
        left_ = -1;
        return;
      }
      run = load_nc(params_.runs + run_ % params_.num_runs);
      ++run_;
    } while (place.rank >= static_cast<int>(run.v[3]));
    const int64_t at = static_cast<int64_t>(run.v[1]) * (kWarps * kStageElements);
    from_ = params_.weights[run.v[0]] + (at + warp_index() * kStageElements + lane_index() * 8);
    left_ = static_cast<int>(run.v[2]);
  }

  const ForwardParams<T>& params_;
  SharedPtr<T> ring_; // of this lane
  GlobalPtr<const T> from_{nullptr};
  int run_ = 0, left_ = 0, last_ = kStages - 1;
};

} // namespace gpu
} // namespace trmfast
