// The primitives of csrc/cuda/primitives.cuh on the host: each is a call into the emulator. Included by that header.
#pragma once

#include <cmath>
#include <cstring>

#include "memory.h"

namespace trmfast {
namespace simt {

// The machine interface of the primitives; addresses and values belong to the current thread.
int thread_index();
int block_index();
int thread_count();
int block_count();
void load_shared(uint32_t address, void* value, size_t bytes, Site site);
void store_shared(uint32_t address, const void* value, size_t bytes, Site site);
void load_global(const void* pointer, void* value, size_t bytes, bool read_only, Site site);
void store_global(void* pointer, const void* value, size_t bytes, Site site);
void prefetch(const void* pointer, Site site);
void cp_async(uint32_t to, const void* from, bool valid, Site site);
void cp_async_commit();
void cp_async_wait(int groups, Site site);
void ldmatrix(uint32_t* registers, int matrices, bool transposed, uint32_t row, Site site);
void mma(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, bool is_bf16, Site site);
void sync_warp(Site site);
uint32_t shuffle(uint32_t value, int lane, Site site);
bool vote(bool p, bool all, Site site);
void block_sync(Site site);
bool block_vote(bool p, bool all, Site site);
void named_barrier(int id, int threads, bool waits, Site site);
uint32_t load_acquire(const uint32_t* pointer, Site site);
void store_release(uint32_t* pointer, uint32_t value, Site site);
uint32_t atomic_add(uint32_t* pointer, uint32_t value, bool releases, Site site);
uint64_t global_timer();
void nanosleep();

// Conversions, round to nearest even; NaN becomes 0x7fff, as on the device.
float bf16_to_float(uint16_t bits);
uint16_t float_to_bf16(float x);
float fp16_to_float(uint16_t bits);
uint16_t float_to_fp16(float x);

} // namespace simt

namespace gpu {

inline int thread_index() { return simt::thread_index(); }
inline int block_index() { return simt::block_index(); }
inline int thread_count() { return simt::thread_count(); }
inline int block_count() { return simt::block_count(); }

template <class T> SharedPtr<T> shared_memory(int byte_offset = 0) { return {static_cast<uint32_t>(byte_offset)}; }

// ---- loads and stores

template <class T> Value<T> load(SharedPtr<T> p, Site site = Site::here()) {
  static_assert(is_access<T>, "2, 4, 8 or 16 bytes");
  Value<T> value;
  simt::load_shared(p.address, &value, sizeof value, site);
  return value;
}

template <class T> void store(SharedPtr<T> p, T value, Site site = Site::here()) {
  static_assert(is_access<T> && !std::is_const<T>::value, "2, 4, 8 or 16 bytes, not const");
  simt::store_shared(p.address, &value, sizeof value, site);
}

template <class T> Value<T> load(GlobalPtr<T> p, Site site = Site::here()) {
  static_assert(is_access<T>, "2, 4, 8 or 16 bytes");
  Value<T> value;
  simt::load_global(p.pointer, &value, sizeof value, false, site);
  return value;
}

template <class T> Value<T> load_nc(GlobalPtr<T> p, Site site = Site::here()) {
  static_assert(is_access<T>, "2, 4, 8 or 16 bytes");
  Value<T> value;
  simt::load_global(p.pointer, &value, sizeof value, true, site);
  return value;
}

template <class T> void store(GlobalPtr<T> p, T value, Site site = Site::here()) {
  static_assert(is_access<T> && !std::is_const<T>::value, "2, 4, 8 or 16 bytes, not const");
  simt::store_global(p.pointer, &value, sizeof value, site);
}

template <class T> void prefetch_l2(GlobalPtr<T> p, Site site = Site::here()) { simt::prefetch(p.pointer, site); }

// ---- cp.async

template <class T, class U>
void cp_async_16(SharedPtr<T> to, GlobalPtr<U> from, bool valid = true, Site site = Site::here()) {
  simt::cp_async(to.address, from.pointer, valid, site);
}

inline void cp_async_commit(Site = Site::here()) { simt::cp_async_commit(); }

template <int kGroups> void cp_async_wait(Site site = Site::here()) {
  static_assert(kGroups >= 0, "groups left in flight");
  simt::cp_async_wait(kGroups, site);
}

// ---- matrices

template <class T> void ldmatrix_x1(uint32_t (&r)[1], SharedPtr<T> row, Site site = Site::here()) {
  simt::ldmatrix(r, 1, false, row.address, site);
}

template <class T> void ldmatrix_x2(uint32_t (&r)[2], SharedPtr<T> row, Site site = Site::here()) {
  simt::ldmatrix(r, 2, false, row.address, site);
}

template <class T> void ldmatrix_x4(uint32_t (&r)[4], SharedPtr<T> row, Site site = Site::here()) {
  simt::ldmatrix(r, 4, false, row.address, site);
}

template <class T> void ldmatrix_x1_trans(uint32_t (&r)[1], SharedPtr<T> row, Site site = Site::here()) {
  simt::ldmatrix(r, 1, true, row.address, site);
}

template <class T> void ldmatrix_x2_trans(uint32_t (&r)[2], SharedPtr<T> row, Site site = Site::here()) {
  simt::ldmatrix(r, 2, true, row.address, site);
}

template <class T> void ldmatrix_x4_trans(uint32_t (&r)[4], SharedPtr<T> row, Site site = Site::here()) {
  simt::ldmatrix(r, 4, true, row.address, site);
}

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site = Site::here()) {
  static_assert(is_half<T>, "bf16 or fp16");
  simt::mma(d, a, b0, b1, std::is_same<T, bf16>::value, site);
}

// ---- warps

inline void sync_warp(Site site = Site::here()) { simt::sync_warp(site); }

template <class T> T shuffle(T x, int lane, Site site = Site::here()) {
  static_assert(sizeof(T) == 4, "32 bits");
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits = simt::shuffle(bits, lane & (kWarpSize - 1), site);
  std::memcpy(&x, &bits, sizeof bits);
  return x;
}

template <class T> T shuffle_xor(T x, int mask, Site site = Site::here()) {
  return shuffle(x, simt::thread_index() ^ mask, site);
}

inline bool warp_any(bool p, Site site = Site::here()) { return simt::vote(p, false, site); }
inline bool warp_all(bool p, Site site = Site::here()) { return simt::vote(p, true, site); }

// ---- blocks

inline void block_sync(Site site = Site::here()) { simt::block_sync(site); }
inline bool block_any(bool p, Site site = Site::here()) { return simt::block_vote(p, false, site); }
inline bool block_all(bool p, Site site = Site::here()) { return simt::block_vote(p, true, site); }

inline void named_barrier_sync(int id, int threads, Site site = Site::here()) {
  simt::named_barrier(id, threads, true, site);
}

inline void named_barrier_arrive(int id, int threads, Site site = Site::here()) {
  simt::named_barrier(id, threads, false, site);
}

// ---- between blocks

inline uint32_t load_acquire(GlobalPtr<uint32_t> p, Site site = Site::here()) {
  return simt::load_acquire(p.pointer, site);
}

inline void store_release(GlobalPtr<uint32_t> p, uint32_t value, Site site = Site::here()) {
  simt::store_release(p.pointer, value, site);
}

inline uint32_t atomic_add(GlobalPtr<uint32_t> p, uint32_t value, Site site = Site::here()) {
  return simt::atomic_add(p.pointer, value, false, site);
}

inline void atomic_add_release(GlobalPtr<uint32_t> p, uint32_t value, Site site = Site::here()) {
  simt::atomic_add(p.pointer, value, true, site);
}

inline uint64_t global_timer(Site = Site::here()) { return simt::global_timer(); }
inline void nanosleep(uint32_t, Site = Site::here()) { simt::nanosleep(); }

// ---- numbers

inline float to_float(bf16 x) { return simt::bf16_to_float(x.bits); }
inline float to_float(fp16 x) { return simt::fp16_to_float(x.bits); }

template <class T> T from_float(float x) {
  static_assert(is_half<T>, "bf16 or fp16");
  return {std::is_same<T, bf16>::value ? simt::float_to_bf16(x) : simt::float_to_fp16(x)};
}

template <class T> uint32_t pack(float low, float high) {
  return static_cast<uint32_t>(from_float<T>(low).bits) | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

template <class T> F32x2 unpack(uint32_t word) {
  static_assert(is_half<T>, "bf16 or fp16");
  return {{to_float(T{static_cast<uint16_t>(word)}), to_float(T{static_cast<uint16_t>(word >> 16)})}};
}

// As on the device, denormals are zero on the way in and out.
inline float flush_denormal(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
inline float fast_exp2(float x) { return flush_denormal(std::exp2(flush_denormal(x))); }
inline float fast_rcp(float x) { return flush_denormal(1.0f / flush_denormal(x)); }
inline float fast_rsqrt(float x) { return 1.0f / std::sqrt(flush_denormal(x)); }

} // namespace gpu
} // namespace trmfast
