// One lane touches memory: bounds, alignment, and what other threads did there.
#pragma once

#include "warp.h"

namespace trmfast {
namespace ptx {

struct Place {
  uint8_t* data;
  Cell* cells; // or null
};

// Where `size` bytes of shared memory are.  `value`: what is about to be written, or null.
Place touch_shared(Warp& w, const Actor& actor, uint32_t address, uint32_t size, Access access, const void* value);

// The same for global memory; `align` is the alignment of the whole access.
Place touch_global(Warp& w, const Actor& actor, uint64_t address, uint32_t size, Access access, const void* value);

} // namespace ptx
} // namespace trmfast
