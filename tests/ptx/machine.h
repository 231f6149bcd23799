// Blocks, warps and the order in which they run.
#pragma once

#include "warp.h"

#include <memory>
#include <random>

namespace trmfast {
namespace ptx {

enum class Order : int32_t {
  forward, // the first block and warp that can run go as far as possible
  reverse, // the last
  random,  // any, for a few operations or as far as possible
};

struct Options {
  Order order = Order::forward;
  uint64_t seed = 0;
  uint32_t resident_blocks = 1;
  bool blocks_share = false; // blocks may read and write what others write if a release and an acquire order it
  bool truncate_mma = false;
};

struct Launch {
  uint32_t grid[3];
  uint32_t threads;
  uint32_t shared_bytes; // dynamic
  const uint8_t* params;
  uint32_t param_bytes;
  GlobalMemory* global;
};

struct Counts {
  uint64_t operations = 0; // of warps
  uint64_t blocks = 0;
};

Counts run(const Program& program, const Launch& launch, const Options& options);

} // namespace ptx
} // namespace trmfast
