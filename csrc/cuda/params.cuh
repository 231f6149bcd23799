// The parameters of one launch of the forward recursion, filled by the launcher.
#pragma once

#include "layout.h"
#include "primitives.cuh"

namespace trmfast {
namespace gpu {

// One layer of one update (Schedule in launch_shape.h): a CTA's work between two barriers, as four words.
struct Step {
  DEVICE explicit Step(const U32x4& words) : words_(words) {}
  DEVICE int dst() const { return static_cast<int>(words_.v[0] & 0xff); }
  DEVICE bool is_first() const { return (words_.v[0] & kFirstLayer) != 0; }
  DEVICE bool is_last() const { return (words_.v[0] & kLastLayer) != 0; }
  DEVICE int saved() const { return static_cast<int>(words_.v[1]) - 1; } // its place in the gradient window, or -1
  DEVICE int first_source() const { return static_cast<int>(words_.v[2]); }
  DEVICE int num_sources() const { return static_cast<int>(words_.v[3]); } // x among them

private:
  U32x4 words_;
};

// Pointers are aligned to 16 bytes.  T: bf16 or fp16.
template <class T> struct ForwardParams {
  LayerLayout layout; // of all nets
  int batch, length;
  int groups, group_blocks; // the grid: groups * group_blocks blocks
  int num_steps, num_runs;
  uint32_t unwritten;                    // bit s: state s is never written, it goes from states_in to states_out
  GlobalPtr<const U32x4> steps;          // the program (Schedule in launch_shape.h): num_steps
  GlobalPtr<const uint32_t> sources;     // of its updates
  GlobalPtr<const U32x4> runs;           // num_runs: the order of the weights
  GlobalPtr<const T> weights[kMostNets]; // packed layers of a net, one after the other
  GlobalPtr<const T> states_in[kMostStates];
  GlobalPtr<T> states_out[kMostStates]; // each [B, L, D]; not states_in
  GlobalPtr<const T> x;                 // [B, L, D] or null
  GlobalPtr<T> saved;                   // [G, B, L, D], the summed input of every update with gradient; or null
  GlobalPtr<const float> cos, sin;      // [>= L, head_dim] or null: no rotation
  GlobalPtr<T> exchange;                // groups * exchange_elements, between the blocks of a group
  int64_t exchange_elements;
  GlobalPtr<uint32_t> arrivals; // groups * kArrivalStride, zero at launch
  GlobalPtr<uint32_t> failed;   // zero at launch; afterwards the number of blocks that waited longer than timeout_ns
  uint64_t timeout_ns;
};

// An instance of the kernel (InstanceSizes in shape.h); kTokens and kStrips are 0 for attention.
template <class Element, int kRows, int kStages, int kWidth, int kTokens, int kStrips> struct Instance {
  using T = Element;
  static constexpr int kRowTiles = kRows, kRingStages = kStages, kWidthTiles = kWidth, kTokenTiles = kTokens,
                       kStripTiles = kStrips;
};

} // namespace gpu
} // namespace trmfast
