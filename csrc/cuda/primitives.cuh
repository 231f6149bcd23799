// The complete set of machine operations that trmfast's CUDA kernels may use: the same kernel source
// compiles with nvcc, where each primitive is one instruction (primitives_device.cuh), and with g++, where it is a call
// into the SIMT emulator (tests/simt/primitives.h).  sm_80 instructions only.
//
// Kernels are templates of DEVICE functions over their parameters; a thin __global__ under __CUDACC__ wraps them, and
// on the host simt::launch (tests/simt/simt.h) runs them.  Blocks and grids have one dimension.
//
//   indices     thread_index() block_index() thread_count() block_count() lane_index() warp_index()
//   pointers    GlobalPtr<T>, SharedPtr<T>: p + elements, p.as<U>(); they cannot be dereferenced, only passed to these:
//               shared_memory<T>(byte_offset)               the block's dynamic shared memory, aligned to 1024 bytes
//               load(p) store(p, value)                     one access of 2, 4, 8 or 16 bytes; naturally aligned
//               load_nc(p)                                  global, for data not written during the launch
//               prefetch_l2(p)
//   vectors     F32x2 F32x4 U32x2 U32x4: .v[i]
//   copies      cp_async_16(shared, global[, valid])        16 bytes through L2; if !valid zeros, nothing is read
//               cp_async_commit() cp_async_wait<N>()        leaves at most this thread's N latest groups in flight
//   matrices    ldmatrix_x1/_x2/_x4(r, row), ldmatrix_x1/_x2/_x4_trans(r, row)
//               mma_m16n8k16<T>(d, a, b0, b1)               d += a b, T = bf16 or fp16, fp32 accumulation
//   warp        sync_warp() shuffle(x, lane) shuffle_xor(x, mask) warp_any(p) warp_all(p)
//               lanes_sum<W>(x) lanes_max<W>(x)             over aligned groups of W lanes, the result in each of them
//               warp_sum(x) warp_max(x)
//   block       block_sync() block_any(p) block_all(p)
//               named_barrier_sync(id, threads) named_barrier_arrive(id, threads)    whole warps; id 1 to 15,
//               best a constant: otherwise the kernel holds all 16 barriers
//   grid        load_acquire(p) store_release(p, x) atomic_add(p, x) atomic_add_release(p, x)   scope: the device
//               wait_at_least(p, x, timeout_ns)             false after the time-out
//               group_barrier(counter, target, timeout_ns)  all threads of every block of the group; false: timed out
//               global_timer() (ns)  nanosleep(ns)
//   numbers     to_float(x) from_float<T>(x) pack<T>(low, high) unpack<T>(word)
//               fast_exp2(x) fast_rcp(x) fast_rsqrt(x)      approximate to a few units in the last place, no denormals
//
// Rules, which the emulator checks:
// * Warp primitives (shuffles, votes, ldmatrix, mma, sync_warp) and barriers are executed by all 32 lanes together.
//   There are no partial masks, and a thread does not return before its block's last barrier.
// * Memory is ordered between lanes only by sync_warp and barriers; shuffles, ldmatrix and mma order nothing.
// * cp_async_wait makes a thread's own copies visible to itself; the other threads need a barrier after it.
// * Between blocks, memory is ordered by release and acquire: group_barrier, or store_release and load_acquire.
//
// Fragments of m16n8k16 (lane = 4 * g + t, g = 0..7, t = 0..3; registers of a and b hold two elements, low half first):
//   a[0] = A[g][2t, 2t+1]  a[1] = A[g+8][2t, 2t+1]  a[2] = A[g][2t+8, 2t+9]  a[3] = A[g+8][2t+8, 2t+9]
//   b0   = B[2t, 2t+1][g]  b1   = B[2t+8, 2t+9][g]
//   d[0] = D[g][2t]  d[1] = D[g][2t+1]  d[2] = D[g+8][2t]  d[3] = D[g+8][2t+1]
// ldmatrix: lane 8 * i + j names row j (8 elements of 16 bits, 16-byte aligned) of matrix i; register i of a lane gets
//   M_i[g][2t, 2t+1], and transposed M_i[2t, 2t+1][g].  So for A stored [m][k] lane l names row l % 16, columns
//   8 * (l / 16), plain; for B stored [k][n] (n contiguous), x4_trans gives b0 and b1 of two neighbouring n-tiles when
//   lane l names row l % 16, columns 8 * (l / 16); for B stored [n][k] (k contiguous) ldmatrix is plain.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__
#define DEVICE __device__ __forceinline__
#define HOST_DEVICE __host__ __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define NO_UNROLL _Pragma("unroll 1")
#else
#define DEVICE inline
#define HOST_DEVICE inline
#define UNROLL
#define NO_UNROLL
#endif

namespace trmfast {
namespace gpu {

constexpr int kWarpSize = 32;

struct bf16 {
  uint16_t bits;
};

struct fp16 {
  uint16_t bits;
};

template <class T, int kCount> struct alignas(sizeof(T) * kCount) Vector {
  T v[kCount];
};
using F32x2 = Vector<float, 2>;
using F32x4 = Vector<float, 4>;
using U32x2 = Vector<uint32_t, 2>;
using U32x4 = Vector<uint32_t, 4>;

// A pointer into global memory.  In Params, filled by the launcher: GlobalPtr<const bf16>{pointer}.
template <class T> struct GlobalPtr {
  T* pointer;

  HOST_DEVICE GlobalPtr operator+(int64_t elements) const { return {pointer + elements}; }
  HOST_DEVICE GlobalPtr operator-(int64_t elements) const { return {pointer - elements}; }
  HOST_DEVICE explicit operator bool() const { return pointer != nullptr; }
  template <class U = T, class = std::enable_if_t<!std::is_const<U>::value>>
  HOST_DEVICE operator GlobalPtr<const U>() const {
    return {pointer};
  }
  template <class U> HOST_DEVICE GlobalPtr<U> as() const { return {reinterpret_cast<U*>(pointer)}; }
};

// A pointer into the block's shared memory: 32 bits, as ld.shared and ldmatrix take it.
template <class T> struct SharedPtr {
  uint32_t address;

  HOST_DEVICE SharedPtr operator+(int elements) const {
    return {address + static_cast<uint32_t>(elements) * static_cast<uint32_t>(sizeof(T))};
  }
  HOST_DEVICE SharedPtr operator-(int elements) const { return *this + -elements; }
  template <class U = T, class = std::enable_if_t<!std::is_const<U>::value>>
  HOST_DEVICE operator SharedPtr<const U>() const {
    return {address};
  }
  template <class U> HOST_DEVICE SharedPtr<U> as() const { return {address}; }
};

template <class T> constexpr bool is_half = std::is_same<T, bf16>::value || std::is_same<T, fp16>::value;

template <class T> constexpr bool is_access = sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16;

template <class T> using Value = std::remove_const_t<T>;

} // namespace gpu
} // namespace trmfast

#ifdef __CUDACC__
#include "primitives_device.cuh"
#else
#include "simt/primitives.h"
#endif

namespace trmfast {
namespace gpu {

DEVICE int lane_index() { return static_cast<int>(static_cast<unsigned>(thread_index()) % kWarpSize); }

DEVICE int warp_index() { return static_cast<int>(static_cast<unsigned>(thread_index()) / kWarpSize); }

template <int kWidth> DEVICE float lanes_sum(float x, Site site = Site::here()) {
  static_assert(kWidth >= 1 && kWidth <= kWarpSize && (kWidth & (kWidth - 1)) == 0, "a power of two up to the warp");
  UNROLL
  for (int mask = kWidth / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask, site);
  return x;
}

template <int kWidth> DEVICE float lanes_max(float x, Site site = Site::here()) {
  static_assert(kWidth >= 1 && kWidth <= kWarpSize && (kWidth & (kWidth - 1)) == 0, "a power of two up to the warp");
  UNROLL
  for (int mask = kWidth / 2; mask > 0; mask /= 2) x = fmaxf(x, shuffle_xor(x, mask, site));
  return x;
}

DEVICE float warp_sum(float x, Site site = Site::here()) { return lanes_sum<kWarpSize>(x, site); }

DEVICE float warp_max(float x, Site site = Site::here()) { return lanes_max<kWarpSize>(x, site); }

// Waits until *flag, a counter that may wrap around, has reached `value`; what its releasers wrote before is then
// visible. False after `timeout_ns`.
DEVICE bool wait_at_least(GlobalPtr<uint32_t> flag, uint32_t value, uint64_t timeout_ns, Site site = Site::here()) {
  const uint64_t start = global_timer(site);
  while (static_cast<int32_t>(load_acquire(flag, site) - value) < 0) {
    if (global_timer(site) - start > timeout_ns) return false;
    nanosleep(20, site);
  }
  return true;
}

// A barrier over the blocks of a group, which must all be resident.  Each group has its own `counter`; `target` is the
// number of arrivals since the counter was zero at which this barrier opens: the group's blocks times the barriers so
// far, this one included.  All threads of a block get the same result; after false, the group's blocks are out of step
// and the kernel must end.
DEVICE bool group_barrier(GlobalPtr<uint32_t> counter, uint32_t target, uint64_t timeout_ns, Site site = Site::here()) {
  block_sync(site);
  bool arrived = true;
  if (thread_index() == 0) {
    atomic_add_release(counter, 1u, site);
    arrived = wait_at_least(counter, target, timeout_ns, site);
  }
  return block_all(arrived, site);
}

} // namespace gpu
} // namespace trmfast
