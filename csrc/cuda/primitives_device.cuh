// The primitives of primitives.cuh as inline PTX.  Everything that touches memory or synchronises is a volatile asm
// with a memory clobber, so nvcc keeps their order; ptxas schedules them as plain instructions.
#pragma once

namespace trmfast {
namespace gpu {

// The call site of a primitive; empty on the device.
struct Site {
  static constexpr DEVICE Site here() { return {}; }
};

DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }

DEVICE int block_index() { return static_cast<int>(blockIdx.x); }

DEVICE int thread_count() { return static_cast<int>(blockDim.x); }

DEVICE int block_count() { return static_cast<int>(gridDim.x); }

extern __shared__ __align__(1024) unsigned char trmfast_dynamic_shared[];

template <class T> DEVICE SharedPtr<T> shared_memory(int byte_offset = 0) {
  return {static_cast<uint32_t>(__cvta_generic_to_shared(trmfast_dynamic_shared)) + static_cast<uint32_t>(byte_offset)};
}

// ---- loads and stores

template <class T> DEVICE Value<T> load(SharedPtr<T> p, Site = {}) {
  static_assert(is_access<T>, "2, 4, 8 or 16 bytes");
  Value<T> value;
  if constexpr (sizeof(T) == 2) {
    uint16_t bits;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(bits) : "r"(p.address) : "memory");
    __builtin_memcpy(&value, &bits, sizeof value);
  } else {
    uint32_t w[sizeof(T) / 4];
    if constexpr (sizeof(T) == 4)
      asm volatile("ld.shared.u32 %0, [%1];" : "=r"(w[0]) : "r"(p.address) : "memory");
    else if constexpr (sizeof(T) == 8)
      asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "r"(p.address) : "memory");
    else
      asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                   : "r"(p.address)
                   : "memory");
    __builtin_memcpy(&value, w, sizeof value);
  }
  return value;
}

template <class T> DEVICE void store(SharedPtr<T> p, T value, Site = {}) {
  static_assert(is_access<T> && !std::is_const<T>::value, "2, 4, 8 or 16 bytes, not const");
  if constexpr (sizeof(T) == 2) {
    uint16_t bits;
    __builtin_memcpy(&bits, &value, sizeof value);
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(p.address), "h"(bits) : "memory");
  } else {
    uint32_t w[sizeof(T) / 4];
    __builtin_memcpy(w, &value, sizeof value);
    if constexpr (sizeof(T) == 4)
      asm volatile("st.shared.u32 [%0], %1;" ::"r"(p.address), "r"(w[0]) : "memory");
    else if constexpr (sizeof(T) == 8)
      asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(p.address), "r"(w[0]), "r"(w[1]) : "memory");
    else
      asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(p.address), "r"(w[0]), "r"(w[1]), "r"(w[2]),
                   "r"(w[3])
                   : "memory");
  }
}

template <class T> DEVICE Value<T> load(GlobalPtr<T> p, Site = {}) {
  static_assert(is_access<T>, "2, 4, 8 or 16 bytes");
  Value<T> value;
  if constexpr (sizeof(T) == 2) {
    uint16_t bits;
    asm volatile("ld.global.u16 %0, [%1];" : "=h"(bits) : "l"(p.pointer) : "memory");
    __builtin_memcpy(&value, &bits, sizeof value);
  } else {
    uint32_t w[sizeof(T) / 4];
    if constexpr (sizeof(T) == 4)
      asm volatile("ld.global.u32 %0, [%1];" : "=r"(w[0]) : "l"(p.pointer) : "memory");
    else if constexpr (sizeof(T) == 8)
      asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "l"(p.pointer) : "memory");
    else
      asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                   : "l"(p.pointer)
                   : "memory");
    __builtin_memcpy(&value, w, sizeof value);
  }
  return value;
}

// Through the read-only path: not volatile, so equal loads merge and hoist.
template <class T> DEVICE Value<T> load_nc(GlobalPtr<T> p, Site = {}) {
  static_assert(is_access<T>, "2, 4, 8 or 16 bytes");
  Value<T> value;
  if constexpr (sizeof(T) == 2) {
    uint16_t bits;
    asm("ld.global.nc.u16 %0, [%1];" : "=h"(bits) : "l"(p.pointer));
    __builtin_memcpy(&value, &bits, sizeof value);
  } else {
    uint32_t w[sizeof(T) / 4];
    if constexpr (sizeof(T) == 4)
      asm("ld.global.nc.u32 %0, [%1];" : "=r"(w[0]) : "l"(p.pointer));
    else if constexpr (sizeof(T) == 8)
      asm("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "l"(p.pointer));
    else
      asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
          : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
          : "l"(p.pointer));
    __builtin_memcpy(&value, w, sizeof value);
  }
  return value;
}

template <class T> DEVICE void store(GlobalPtr<T> p, T value, Site = {}) {
  static_assert(is_access<T> && !std::is_const<T>::value, "2, 4, 8 or 16 bytes, not const");
  if constexpr (sizeof(T) == 2) {
    uint16_t bits;
    __builtin_memcpy(&bits, &value, sizeof value);
    asm volatile("st.global.u16 [%0], %1;" ::"l"(p.pointer), "h"(bits) : "memory");
  } else {
    uint32_t w[sizeof(T) / 4];
    __builtin_memcpy(w, &value, sizeof value);
    if constexpr (sizeof(T) == 4)
      asm volatile("st.global.u32 [%0], %1;" ::"l"(p.pointer), "r"(w[0]) : "memory");
    else if constexpr (sizeof(T) == 8)
      asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(p.pointer), "r"(w[0]), "r"(w[1]) : "memory");
    else
      asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p.pointer), "r"(w[0]), "r"(w[1]), "r"(w[2]),
                   "r"(w[3])
                   : "memory");
  }
}

template <class T> DEVICE void prefetch_l2(GlobalPtr<T> p, Site = {}) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p.pointer));
}

// ---- cp.async

template <class T, class U>
DEVICE void cp_async_16(SharedPtr<T> to, GlobalPtr<U> from, bool valid = true, Site = {}) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to.address), "l"(from.pointer),
               "r"(valid ? 16 : 0)
               : "memory");
}

DEVICE void cp_async_commit(Site = {}) { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kGroups> DEVICE void cp_async_wait(Site = {}) {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// ---- matrices

template <class T> DEVICE void ldmatrix_x1(uint32_t (&r)[1], SharedPtr<T> row, Site = {}) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(row.address) : "memory");
}

template <class T> DEVICE void ldmatrix_x2(uint32_t (&r)[2], SharedPtr<T> row, Site = {}) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(row.address)
               : "memory");
}

template <class T> DEVICE void ldmatrix_x4(uint32_t (&r)[4], SharedPtr<T> row, Site = {}) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row.address)
               : "memory");
}

template <class T> DEVICE void ldmatrix_x1_trans(uint32_t (&r)[1], SharedPtr<T> row, Site = {}) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(row.address) : "memory");
}

template <class T> DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], SharedPtr<T> row, Site = {}) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(row.address)
               : "memory");
}

template <class T> DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], SharedPtr<T> row, Site = {}) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row.address)
               : "memory");
}

template <class T>
DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site = {}) {
  static_assert(is_half<T>, "bf16 or fp16");
  if constexpr (std::is_same<T, bf16>::value)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- warps

DEVICE void sync_warp(Site = {}) { __syncwarp(); }

template <class T> DEVICE T shuffle(T x, int lane, Site = {}) {
  static_assert(sizeof(T) == 4, "32 bits");
  return __shfl_sync(0xffffffffu, x, lane);
}

template <class T> DEVICE T shuffle_xor(T x, int mask, Site = {}) {
  static_assert(sizeof(T) == 4, "32 bits");
  return __shfl_xor_sync(0xffffffffu, x, mask);
}

DEVICE bool warp_any(bool p, Site = {}) { return __any_sync(0xffffffffu, p) != 0; }

DEVICE bool warp_all(bool p, Site = {}) { return __all_sync(0xffffffffu, p) != 0; }

// ---- blocks

DEVICE void block_sync(Site = {}) { __syncthreads(); }

DEVICE bool block_any(bool p, Site = {}) { return __syncthreads_or(p) != 0; }

DEVICE bool block_all(bool p, Site = {}) { return __syncthreads_and(p) != 0; }

DEVICE void named_barrier_sync(int id, int threads, Site = {}) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

DEVICE void named_barrier_arrive(int id, int threads, Site = {}) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- between blocks

DEVICE uint32_t load_acquire(GlobalPtr<uint32_t> p, Site = {}) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(p.pointer) : "memory");
  return value;
}

DEVICE void store_release(GlobalPtr<uint32_t> p, uint32_t value, Site = {}) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p.pointer), "r"(value) : "memory");
}

DEVICE uint32_t atomic_add(GlobalPtr<uint32_t> p, uint32_t value, Site = {}) {
  uint32_t old;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(p.pointer), "r"(value) : "memory");
  return old;
}

DEVICE void atomic_add_release(GlobalPtr<uint32_t> p, uint32_t value, Site = {}) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p.pointer), "r"(value) : "memory");
}

DEVICE uint64_t global_timer(Site = {}) {
  uint64_t ns;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns)::"memory");
  return ns;
}

DEVICE void nanosleep(uint32_t ns, Site = {}) { __nanosleep(ns); }

// ---- numbers

DEVICE float to_float(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }

DEVICE float to_float(fp16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

template <class T> DEVICE T from_float(float x) {
  static_assert(is_half<T>, "bf16 or fp16");
  T y;
  if constexpr (std::is_same<T, bf16>::value)
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}

template <class T> DEVICE uint32_t pack(float low, float high) {
  static_assert(is_half<T>, "bf16 or fp16");
  uint32_t word;
  if constexpr (std::is_same<T, bf16>::value)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

template <class T> DEVICE F32x2 unpack(uint32_t word) {
  static_assert(is_half<T>, "bf16 or fp16");
  if constexpr (std::is_same<T, bf16>::value) {
    return {{__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)}};
  } else {
    F32x2 x;
    asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\ncvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}"
        : "=f"(x.v[0]), "=f"(x.v[1])
        : "r"(word));
    return x;
  }
}

DEVICE float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

DEVICE float fast_rcp(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

DEVICE float fast_rsqrt(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

} // namespace gpu
} // namespace trmfast
