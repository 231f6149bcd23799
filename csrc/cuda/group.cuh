// The blocks of a group: how they exchange data and synchronise.
#pragma once

#include "params.cuh"

namespace trmfast {
namespace gpu {

// This CTA's position.  In shared memory: registers are scarce at its uses, and a load cannot be hoisted.
struct Place {
  int group, rank; // rank: in the group
  int sequences;   // that the group takes: group, group + groups, ...

  template <class T> static DEVICE void set(const ForwardParams<T>& p) {
    if (thread_index() == 0) {
      const int group = block_index() / p.group_blocks;
      const int sequences = group < p.batch ? ceil_div(p.batch - group, p.groups) : 0;
      store(shared_memory<U32x4>(),
            U32x4{{static_cast<uint32_t>(group), static_cast<uint32_t>(block_index() % p.group_blocks),
                   static_cast<uint32_t>(sequences), 0}});
    }
    block_sync();
  }
  static DEVICE Place get() {
    const U32x4 words = load(shared_memory<const U32x4>());
    return {static_cast<int>(words.v[0]), static_cast<int>(words.v[1]), static_cast<int>(words.v[2])};
  }
};

template <class T> DEVICE GlobalPtr<T> exchange_of_group(const ForwardParams<T>& p) {
  return p.exchange + Place::get().group * p.exchange_elements;
}

// Barrier `number` of a group, counted from 1.  After it every block sees what the others wrote before it.  False:
// timed out.
template <class T> DEVICE bool wait_for_group(const ForwardParams<T>& p, int number) {
  if (p.group_blocks == 1) {
    block_sync();
    return true;
  }
  return group_barrier(p.arrivals + Place::get().group * kArrivalStride, static_cast<uint32_t>(number * p.group_blocks),
                       p.timeout_ns);
}

} // namespace gpu
} // namespace trmfast
