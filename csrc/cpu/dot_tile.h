// The matrix product of a few rows with one 32-wide panel, for every target with vector multiply-adds.
//
//   c[r][0..31] (+)= sum_k a[r][k] * b[k][0..31]        r < rows
//
//   a   row-major, lda elements from row to row; streamed: read once per column pass, a dword at a time, and broadcast
//   b   one panel: float [depth][32], bf16 [depth/2][32][2]
//   c   float, row-major, ldc floats from row to row; touched only before and after the loop over the depth
//
// A dword is one float or two consecutive bf16, so one step advances a by 4 bytes and b by 128, whatever the element.
// The accumulators, kTileRows x kTileVectors vectors, stay in registers over the whole depth; the panel takes
// 32 / (kTileVectors * kLanes) column passes. A `Step` says how a dword of a and a vector of dwords of b are
// multiplied:
//
//   Step::Element, Step::kDepth         the element type, how many of them are in a dword
//   Step::kParts                        multiply-adds per dword (2 where bf16 is widened)
//   Step::broadcast_row<part>(p)        the dword of a, in all lanes
//   Step::load_columns<part>(p)         kLanes dwords of b
//   Step::multiply_add(row, columns, c)
#pragma once

#include "simd.h"

namespace trmfast {
namespace TRMFAST_NAMESPACE {

// The tile of each vector target, for float and bf16.
template <class T>
struct VectorDot;

// The micro-kernel of the target: its tile, unless it has a bf16 product of its own and specialises Dot<bf16>.
template <class T>
struct Dot : VectorDot<T> {};

constexpr int kPanelColumns = 32;

// Memory to bring into L2 during a call, evenly over its depth; up to the size of the panel. See dot.h.
struct Prefetch {
  const void* from = nullptr;
  long bytes = 0;
};

// Where a step of a product leaves nothing else to do.
struct DoNothing {
  void operator()(int) const {}
};

// Addresses of up to 15 rows in five registers: bases five rows apart, and the x86 addressing modes base + {1, 2, 4} *
// stride and base + stride3. The compiler must not see how the bases are related, or it keeps one pointer per row and
// spills.
struct RowPointers {
  char* base[3];
  long stride, stride3;

  TRMFAST_MEMBER RowPointers(const void* a, long stride_bytes, int rows)
      : stride(stride_bytes), stride3(3 * stride_bytes) {
    for (int i = 0; i < 3; ++i) {
      base[i] = static_cast<char*>(const_cast<void*>(a)) + (5 * i < rows ? 5 * i : 0) * stride_bytes;
      asm("" : "+r"(base[i]));
    }
    asm("" : "+r"(stride3));
  }

  TRMFAST_MEMBER char* row(int r) const {
    const int i = r % 5;
    return base[r / 5] + (i == 3 ? stride3 : i * stride);
  }

  TRMFAST_MEMBER void advance(long bytes) {
    for (int i = 0; i < 3; ++i) base[i] += bytes;
  }
};

template <class TileStep, int kTileRows, int kTileVectors>
struct TileDot {
  using Step = TileStep;
  using T = typename Step::Element;
  static constexpr int kRows = kTileRows;
  static constexpr int kWholeRows = 1;
  static constexpr int kDepthStep = Step::kDepth;

  // Inline: as a function it copies `next` on the stack as one vector right after the caller wrote its two halves,
  // and stalls until those stores leave the store buffer: 2 % of the samples of a training step.
  TRMFAST_INLINE void run(const T* a, long lda, const T* b, int depth, int rows, float* c, long ldc, bool accumulate,
                          Prefetch next = {}) {
    for (int column = 0; column < kPanelColumns; column += kTileVectors * kLanes) {
      choose<kTileRows>(a, lda, b + column * Step::kDepth, depth, rows, c + column, ldc, accumulate, next);
    }
  }

  // Tile hardware keeps state between calls; this kernel has none.
  static void forget() {}
  static void release() {}

private:
  // Full tiles first: almost all calls use them.
  template <int R>
  TRMFAST_INLINE void choose(const T* a, long lda, const T* b, int depth, int rows, float* c, long ldc, bool accumulate,
                             Prefetch next) {
    if (rows == R) {
      tile<R>(a, lda, b, depth, c, ldc, accumulate, next);
    } else if constexpr (R > 1) {
      choose<R - 1>(a, lda, b, depth, rows, c, ldc, accumulate, next);
    }
  }

  template <int R>
  __attribute__((noinline)) static void tile(const T* a, long lda, const T* b, int depth, float* c, long ldc,
                                             bool accumulate, Prefetch next) {
    vf acc[R][kTileVectors] = {};
    RowPointers rows(a, lda * static_cast<long>(sizeof(T)), R);
    const char* panel = reinterpret_cast<const char*>(b);
    const long steps = depth / Step::kDepth;
    const char* const end = panel + steps * kPanelColumns * 4;
    // With nothing to fetch, this touches the panel itself: cheaper than a second loop or a branch.
    const char* ahead = next.from ? static_cast<const char*>(next.from) : panel;
    const long ahead_step = next.from && steps ? (next.bytes + steps - 1) / steps : 0;
#pragma GCC unroll 1
    while (panel < end) {
      __builtin_prefetch(ahead, 0, 2);
      __builtin_prefetch(ahead + 64, 0, 2);
      ahead += ahead_step;
      multiply_part<0, R>(rows, panel, acc);
      if constexpr (Step::kParts == 2) {
        // Reload the dwords: kept from the first part, they would not fit beside the accumulators.
        asm volatile("" ::: "memory");
        multiply_part<1, R>(rows, panel, acc);
      }
      rows.advance(4);
      panel += kPanelColumns * 4;
    }

    const RowPointers outputs(c, ldc * 4, R);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      float* out = reinterpret_cast<float*>(outputs.row(r));
#pragma GCC unroll 8
      for (int v = 0; v < kTileVectors; ++v)
        store(out + v * kLanes, accumulate ? load(out + v * kLanes) + acc[r][v] : acc[r][v]);
    }
  }

  template <int kPart, int R>
  TRMFAST_INLINE void multiply_part(const RowPointers& rows, const char* panel, vf (&acc)[R][kTileVectors]) {
    typename Step::Vector columns[kTileVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kTileVectors; ++v) columns[v] = Step::template load_columns<kPart>(panel + v * kLanes * 4);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const typename Step::Vector row = Step::template broadcast_row<kPart>(rows.row(r));
#pragma GCC unroll 8
      for (int v = 0; v < kTileVectors; ++v) acc[r][v] = Step::multiply_add(row, columns[v], acc[r][v]);
    }
  }
};

struct FloatStep {
  using Element = float;
  using Vector = vf;
  static constexpr int kDepth = 1, kParts = 1;

  template <int>
  TRMFAST_INLINE vf broadcast_row(const char* p) {
    float element;
    __builtin_memcpy(&element, p, sizeof element);
    return broadcast(element);
  }

  template <int>
  TRMFAST_INLINE vf load_columns(const char* p) {
    return load(reinterpret_cast<const float*>(p));
  }

  TRMFAST_INLINE vf multiply_add(vf row, vf columns, vf c) { return fma(row, columns, c); }
};

// bf16 on targets without a bf16 product: the even depth is the low half of the dword shifted up, the odd depth the
// dword with its low half cleared.
struct WidenStep {
  using Element = bf16;
  using Vector = vf;
  static constexpr int kDepth = 2, kParts = 2;

  template <int kPart>
  TRMFAST_INLINE vf widen(vu pairs) {
    if (kPart == 0) return (vf)(pairs << 16);
    // Without a vector register for the mask, which the tiles of AVX2 and AVX-512 do not leave.
#if defined(__AVX512BW__)
    return (vf)_mm512_maskz_mov_epi16(0xaaaaaaaau, (__m512i)pairs);
#elif defined(__AVX2__)
    static const vu kHighHalves = vu{} + 0xffff0000u;
    asm("vpand %1, %0, %0" : "+x"(pairs) : "m"(kHighHalves));
    return (vf)pairs;
#else
    return (vf)(pairs & 0xffff0000u);
#endif
  }

  template <int kPart>
  TRMFAST_INLINE vf broadcast_row(const char* p) {
    uint32_t pair;
    __builtin_memcpy(&pair, p, sizeof pair);
    vu pairs = vu{} + pair;
    // Widen the vector: the compiler would rather widen the scalar, and move each one between the register files.
    TRMFAST_OPAQUE(pairs);
    return widen<kPart>(pairs);
  }

  template <int kPart>
  TRMFAST_INLINE vf load_columns(const char* p) {
    vu pairs;
    __builtin_memcpy(&pairs, p, sizeof pairs);
    return widen<kPart>(pairs);
  }

  TRMFAST_INLINE vf multiply_add(vf row, vf columns, vf c) {
    // In assembly to keep the sum in its register: GCC 12 would let it take over the row's, and spill half of the tile.
#if defined(__AVX512F__)
    asm("vfmadd231ps %2, %1, %0" : "+v"(c) : "v"(row), "v"(columns));
    return c;
#elif defined(__FMA__)
    asm("vfmadd231ps %2, %1, %0" : "+x"(c) : "x"(row), "x"(columns));
    return c;
#else
    return fma(row, columns, c);
#endif
  }
};

} // namespace TRMFAST_NAMESPACE
} // namespace trmfast
