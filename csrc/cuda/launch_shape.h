// Launch geometry as data: which instance of the kernel runs a problem on a device, the sizes of its grid, shared
// memory and exchange, or the one-line reason why it cannot run.  Host only, no CUDA header.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "layout.h"

namespace trmfast {
namespace gpu {

// What an instance needs in shared memory.
inline int shared_bytes(const InstanceSizes& c, const BlockShape& block) {
  const int rows = 16 * c.row_tiles, channels = 16 * c.strip_tiles;
  const int chunks = 2 * rows * (kPassInner + kPad);
  const int q = block.attention ? rows * (block.heads * padded_head(block.head_dim) + kPad) : 0;
  const int own = rows * (8 * kWarps * c.width_tiles + kPad) + larger(chunks, q);
  const int strip = (8 * kWarps * c.token_tiles + 2 * kPassInner) * (channels + kPad);
  return kPlaceBytes + 2 * (kWarps * c.stages * kStageElements + larger(own, block.attention ? 0 : strip));
}

// Elements that a group exchanges through global memory.
inline int64_t exchange_elements(const InstanceSizes& c, const BlockShape& block, int length) {
  const int64_t rows = round_up(length, 16 * c.row_tiles);
  return block.attention ? rows * 4 * block.kv_heads * padded_head(block.head_dim) : int64_t{2} * length * block.width;
}

struct Device {
  int shared_bytes;    // most that a block can have: 163 KB on sm_80, 99 KB on sm_86, 89 and 120, 227 KB on 90 and 100
  int multiprocessors; // each runs one block of this kernel at a time
  // Of the model of time, computed by kernels/persistent.py:
  int stream_rows;  // with fewer rows a block waits for weights, not products
  int cache_blocks; // this many blocks saturate L2
};

struct LaunchShape {
  InstanceSizes sizes;
  int groups, group_blocks, shared_bytes;
  int64_t exchange_elements; // of one group
};

inline std::string number(int64_t x) { return std::to_string(x); }

// Why no instance can run the block; empty if one can.
inline std::string refuse_block(const BlockShape& b) {
  if (b.conv_taps != 0) return "channel_mixer: got conv_swiglu, accepted is swiglu";
  if (b.width < 16 || b.width > 512 || b.width % 16)
    return "hidden_size: got " + number(b.width) + ", accepted are multiples of 16 up to 512";
  if (b.attention && (b.head_dim < 4 || b.head_dim > 128 || b.head_dim % 4))
    return "head_dim: got " + number(b.head_dim) + ", accepted are multiples of 4 up to 128";
  if (!b.attention && b.seq_len > 1024)
    return "seq_len: got " + number(b.seq_len) + ", accepted are lengths up to 1024 for mlp_t";
  return "";
}

// Whether an instance computes such a block.
inline bool matches(const InstanceSizes& c, const BlockShape& block) {
  const LayerLayout layout(block);
  return c.width_tiles == layout.width_tiles && c.token_tiles == layout.token_tiles;
}

// The time of a launch in arbitrary units, to choose among instances: rounds of the resident groups, times a block's
// time per round, which is that of its products or of the weights.  persistent_time in kernels/persistent.py, in
// seconds, also counts keys and values, barriers and packing.
inline int64_t cost(const InstanceSizes& c, int groups, int group_blocks, int batch, const Device& device) {
  const int64_t products = int64_t{16} * c.row_tiles * device.cache_blocks;
  const int64_t weights = int64_t{device.stream_rows} * larger(device.cache_blocks, groups * group_blocks);
  return ceil_div(batch, groups) * (products > weights ? products : weights);
}

// The best instance for a problem, or the reason why there is none.
inline std::string choose_launch(const std::vector<InstanceSizes>& instances, const BlockShape& block, int batch,
                                 int length, const Device& device, LaunchShape* shape) {
  std::string reason = refuse_block(block);
  if (!reason.empty()) return reason;
  reason = "no instance of the kernel for hidden_size " + number(block.width);
  int64_t best = -1;
  for (const InstanceSizes& c : instances) {
    if (!matches(c, block)) continue;
    const int bytes = shared_bytes(c, block), group_blocks = ceil_div(length, 16 * c.row_tiles);
    if (bytes > device.shared_bytes) {
      if (best < 0)
        reason =
            "shared memory: a block needs " + number(bytes) + " bytes, the device has " + number(device.shared_bytes);
      continue;
    }
    if (group_blocks > device.multiprocessors) {
      if (best < 0)
        reason = "length: " + number(length) + " tokens need " + number(group_blocks) +
                 " blocks at the same time, the device runs " + number(device.multiprocessors);
      continue;
    }
    const int groups = smaller(batch, device.multiprocessors / group_blocks);
    const int64_t now = cost(c, groups, group_blocks, batch, device);
    // Ties go to more rows (less traffic), then to the longer ring.
    const InstanceSizes& chosen = shape->sizes;
    if (best >= 0 && (now > best || (now == best && (c.row_tiles < chosen.row_tiles ||
                                                     (c.row_tiles == chosen.row_tiles && c.stages < chosen.stages)))))
      continue;
    best = now;
    *shape = {c, groups, group_blocks, bytes, exchange_elements(c, block, length)};
  }
  return best < 0 ? reason : "";
}

// One update of a program (trmfast/program.py).
struct Update {
  int dst, net;
  std::vector<int> sources;
  bool inject_x, grad;
};

// A program as the lists of words that the kernel reads.
struct Schedule {
  std::vector<uint32_t> steps; // 4 a step: dst and flags; place in the gradient window + 1, or 0; first source; sources
  std::vector<uint32_t> sources; // of all updates: states in the order of the sum, x last
  // Runs of contiguous stages that a CTA streams, 4 words each: net, first stage of its packed weights, stages, and how
  // many CTAs of a group (those of the lowest ranks) read it.
  std::vector<uint32_t> runs;
  uint32_t unwritten = 0; // bit s: no update writes state s
  int saved = 0;          // updates with gradient

  Schedule(const InstanceSizes& c, const LayerLayout& layout, int group_blocks, int num_states,
           const std::vector<Update>& updates, const std::vector<int>& layers) {
    uint32_t written = 0;
    for (const Update& update : updates) {
      const size_t first = sources.size();
      for (const int source : update.sources)
        sources.push_back(static_cast<uint32_t>(source) | ((written >> source & 1) != 0 ? kSourceIsWritten : 0));
      if (update.inject_x) sources.push_back(kSourceIsX);
      const int place = update.grad ? ++saved : 0;
      for (int layer = 0; layer < layers[update.net]; ++layer) {
        const uint32_t flags = (layer == 0 ? kFirstLayer : 0) | (layer + 1 == layers[update.net] ? kLastLayer : 0);
        append(steps, static_cast<uint32_t>(update.dst) | flags, place, first, sources.size() - first);
      }
      written |= 1u << update.dst;
      add_runs(c, layout, group_blocks, update.net, layers[update.net]);
    }
    unwritten = ~written & ((1u << num_states) - 1);
  }

private:
  template <class... Words> static void append(std::vector<uint32_t>& to, Words... words) {
    (to.push_back(static_cast<uint32_t>(words)), ...);
  }

  void add_runs(const InstanceSizes& c, const LayerLayout& layout, int group_blocks, int net, int layers) {
    if (layout.block.attention) return append(runs, net, 0, layers * layout.stages, group_blocks);
    const int strips = ceil_div(layout.block.width, 16 * c.strip_tiles);
    for (int layer = 0; layer < layers; ++layer) {
      const int first = layer * layout.stages;
      for (int strip = 0; strip < strips; strip += group_blocks)
        append(runs, net, first, layout.token_stages, smaller(group_blocks, strips - strip));
      append(runs, net, first + layout.token_stages, layout.stages - layout.token_stages, group_blocks);
    }
  }
};

} // namespace gpu
} // namespace trmfast
