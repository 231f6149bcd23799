// Prints the kernel's instances with the shared memory that launch_shape.h gives the largest block of each: row tiles,
// stages, width tiles, token tiles, strip tiles, bytes.  For tools; no CUDA header, no device.
#include "instances.h"
#include "launch_shape.h"

#include <cstdio>

using namespace trmfast::gpu;

int main() {
#define LISTED(...) InstanceSizes{__VA_ARGS__},
  const InstanceSizes instances[] = {TRMFAST_INSTANCES(LISTED)};
#undef LISTED
  for (const InstanceSizes& c : instances) {
    BlockShape block{};
    block.width = 8 * kWarps * c.width_tiles;
    block.inner = 3 * block.width;
    block.attention = c.token_tiles == 0;
    block.heads = block.kv_heads = block.width / 64;
    block.head_dim = 64;
    block.seq_len = block.seq_inner = 8 * kWarps * c.token_tiles;
    std::printf("%d %d %d %d %d %d\n", c.row_tiles, c.stages, c.width_tiles, c.token_tiles, c.strip_tiles,
                shared_bytes(c, block));
  }
}
