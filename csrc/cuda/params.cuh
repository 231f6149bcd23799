// What a launch of the forward recursion gets: filled by the launcher, read by every part of the kernel.
#pragma once

#include "layout.h"
#include "primitives.cuh"

namespace trmfast {
namespace gpu {

// One update of the program (trmfast/program.py) as four words.
struct PackedUpdate {
  TRMFAST_BOTH static U32x4 make(int dst, int net, bool inject_x, int saved, int first_source, int num_sources) {
    return {{static_cast<uint32_t>(dst) | static_cast<uint32_t>(net) << 8 | static_cast<uint32_t>(inject_x) << 16,
             static_cast<uint32_t>(saved + 1), static_cast<uint32_t>(first_source),
             static_cast<uint32_t>(num_sources)}};
  }

  DEVICE explicit PackedUpdate(const U32x4& words) : words_(words) {}
  DEVICE int dst() const { return static_cast<int>(words_.v[0] & 0xff); }
  DEVICE int net() const { return static_cast<int>(words_.v[0] >> 8 & 0xff); }
  DEVICE bool inject_x() const { return words_.v[0] >> 16 != 0; }
  DEVICE int saved() const { return static_cast<int>(words_.v[1]) - 1; } // its index in the gradient window, or -1
  DEVICE int first_source() const { return static_cast<int>(words_.v[2]); }
  DEVICE int num_sources() const { return static_cast<int>(words_.v[3]); }

private:
  U32x4 words_;
};

// Pointers are aligned to 16 bytes.  T: bf16 or fp16.
template <class T> struct ForwardParams {
  LayerLayout layout; // of all nets
  int batch, length;
  int layers[kMostNets];
  int num_states, num_updates;
  int groups, group_blocks;              // the grid: groups * group_blocks blocks
  GlobalPtr<const U32x4> updates;        // num_updates, as PackedUpdate
  GlobalPtr<const uint32_t> sources;     // of all updates
  GlobalPtr<const T> weights[kMostNets]; // packed layers of a net, one after the other
  GlobalPtr<const T> states_in[kMostStates];
  GlobalPtr<T> states_out[kMostStates]; // each [B, L, D]; not states_in
  GlobalPtr<const T> x;                 // [B, L, D] or null
  GlobalPtr<T> saved;                   // [G, B, L, D], the summed input of every update with gradient; or null
  GlobalPtr<const float> cos, sin;      // [>= L, head_dim] or null: no rotation
  GlobalPtr<T> exchange;                // groups * exchange_elements, between the blocks of a group
  int64_t exchange_elements;
  GlobalPtr<uint32_t> arrivals; // groups * kArrivalStride, zero at launch
  GlobalPtr<uint32_t> failed;   // zero at launch; not zero afterwards: a group waited longer than timeout_ns
  uint64_t timeout_ns;
};

constexpr int kArrivalStride = 32; // counters of different groups in different lines of the cache

} // namespace gpu
} // namespace trmfast
