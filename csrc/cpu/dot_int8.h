// Dot<int8_t>: products of 8-bit integers, summed exactly in 32 bits, so that every target gives the same sums.
//
//   sum[r][j] = start[j] + sum_k a[r][k] * b[k][j]          a: uint8, row-major, lda apart; b: int8, one panel
//
// A dword of the panel is four consecutive depths, [depth/4][32][4], where a bf16 panel has two: the walk through
// memory is that of dot_tile.h.  An instruction multiplies unsigned by signed numbers, so a holds q + 128 for an
// operand q of -127 to 127, and start[j] = -128 sum_k b[k][j] takes the excess away.  Where depths are padded, b is
// zero and a may be anything.
//
// The kernel ends with floats, c[r][j] = sum[r][j] * (columns[j] * rows[r]), unless the scales are null: then c holds
// the sums as int32.
//
// AVX512-VNNI, 14 rows x 2 zmm: 28 accumulators + 2 vectors of b + 1 broadcast dword of a = 31 of 32 registers.  A step
// of four depths is 28 VPDPBUSD, 14 broadcasts, 2 loads and 2 prefetches: 14 cycles of the two ports (0 and 5 on Ice
// Lake and Sapphire Rapids) that multiply, so 256 operations a cycle, four times those of f32.
//
// Without VNNI, VPMADDUBSW would be the shortest way, but it saturates: 2 x 255 x 127 exceeds 16 bits.  Even and odd
// bytes are widened to 16 bits instead and multiplied by VPMADDWD, as WidenStep does with bf16: 4 operations for 4
// depths.
#pragma once

#include "dot.h"

namespace trmfast {
namespace TRMFAST_NAMESPACE {

struct Dequantize {
  const float* rows = nullptr;
  const float* columns = nullptr;
};

template <class TileStep, int kTileRows, int kTileVectors>
struct Int8Dot {
  using Step = TileStep;
  static constexpr int kRows = kTileRows;
  static constexpr int kWholeRows = 1;
  static constexpr int kDepthStep = 4;

  TRMFAST_INLINE void run(const uint8_t* a, long lda, const int8_t* b, int depth, int rows, const int32_t* start,
                          Dequantize scales, float* c, long ldc, Prefetch next = {}) {
    for (int column = 0; column < kPanelColumns; column += kTileVectors * kLanes) {
      choose<kTileRows>(a, lda, b + column * 4, depth, rows, start + column,
                        {scales.rows, scales.columns ? scales.columns + column : nullptr}, c + column, ldc, next);
    }
  }

  static void release() {}

private:
  template <int R>
  TRMFAST_INLINE void choose(const uint8_t* a, long lda, const int8_t* b, int depth, int rows, const int32_t* start,
                             Dequantize scales, float* c, long ldc, Prefetch next) {
    if (rows == R) {
      tile<R>(a, lda, b, depth, start, scales, c, ldc, next);
    } else if constexpr (R > 1) {
      choose<R - 1>(a, lda, b, depth, rows, start, scales, c, ldc, next);
    }
  }

  template <int R>
  __attribute__((noinline)) static void tile(const uint8_t* a, long lda, const int8_t* b, int depth,
                                             const int32_t* start, Dequantize scales, float* c, long ldc,
                                             Prefetch next) {
    vi acc[R][kTileVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kTileVectors; ++v) {
      vi first;
      __builtin_memcpy(&first, start + v * kLanes, sizeof first);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) acc[r][v] = first;
    }
    RowPointers rows(a, lda, R);
    const char* panel = reinterpret_cast<const char*>(b);
    const long steps = depth / kDepthStep;
    const char* const end = panel + steps * kPanelColumns * 4;
    const char* ahead = next.from ? static_cast<const char*>(next.from) : panel;
    const long ahead_step = next.from && steps ? (next.bytes + steps - 1) / steps : 0;
#pragma GCC unroll 1
    while (panel < end) {
      __builtin_prefetch(ahead, 0, 2);
      __builtin_prefetch(ahead + 64, 0, 2);
      ahead += ahead_step;
      multiply_part<0, R>(rows, panel, acc);
      if constexpr (Step::kParts > 1) {
        asm volatile("" ::: "memory"); // as in TileDot
        multiply_part<1, R>(rows, panel, acc);
      }
      if constexpr (Step::kParts > 2) {
        multiply_part<2, R>(rows, panel, acc);
        multiply_part<3, R>(rows, panel, acc);
      }
      rows.advance(4);
      panel += kPanelColumns * 4;
    }

    const RowPointers outputs(c, ldc * 4, R);
    if (!scales.rows) {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < kTileVectors; ++v)
          __builtin_memcpy(outputs.row(r) + v * kLanes * 4, &acc[r][v], sizeof acc[r][v]);
      return;
    }
    vf columns[kTileVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kTileVectors; ++v) columns[v] = load(scales.columns + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const vf row = broadcast(scales.rows[r]);
#pragma GCC unroll 8
      for (int v = 0; v < kTileVectors; ++v)
        store(reinterpret_cast<float*>(outputs.row(r)) + v * kLanes,
              __builtin_convertvector(acc[r][v], vf) * (columns[v] * row));
    }
  }

  template <int kPart, int R>
  TRMFAST_INLINE void multiply_part(const RowPointers& rows, const char* panel, vi (&acc)[R][kTileVectors]) {
    vu columns[kTileVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kTileVectors; ++v) {
      vu quads;
      __builtin_memcpy(&quads, panel + v * kLanes * 4, sizeof quads);
      columns[v] = Step::template columns<kPart>(quads);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      uint32_t quad;
      __builtin_memcpy(&quad, rows.row(r), sizeof quad);
      vu quads = vu{} + quad;
      if constexpr (Step::kParts > 1) TRMFAST_OPAQUE(quads); // widen the vector, not the scalar
      const vu row = Step::template row<kPart>(quads);
#pragma GCC unroll 8
      for (int v = 0; v < kTileVectors; ++v) acc[r][v] = Step::multiply_add(row, columns[v], acc[r][v]);
    }
  }
};

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
// Four depths an instruction.
struct QuadStep {
  static constexpr int kParts = 1;

  template <int>
  TRMFAST_INLINE vu row(vu quads) {
    return quads;
  }
  template <int>
  TRMFAST_INLINE vu columns(vu quads) {
    return quads;
  }
  TRMFAST_INLINE vi multiply_add(vu row, vu columns, vi c) {
#if defined(__AVX512VNNI__)
    return (vi)_mm512_dpbusd_epi32((__m512i)c, (__m512i)row, (__m512i)columns);
#else
    return (vi)_mm256_dpbusd_avx_epi32((__m256i)c, (__m256i)row, (__m256i)columns);
#endif
  }
};
#elif defined(__x86_64__)
// Part 0: depths 0 and 2 of a dword as 16-bit halves, part 1: depths 1 and 3.
struct QuadStep {
  static constexpr int kParts = 2;

  template <int kPart>
  TRMFAST_INLINE vu row(vu quads) {
#if defined(__AVX512BW__)
    if (kPart == 0) return (vu)_mm512_maskz_mov_epi8(0x5555555555555555u, (__m512i)quads);
    return (vu)_mm512_maskz_srli_epi16(0xffffffffu, (__m512i)quads, 8);
#elif defined(__AVX2__)
    if (kPart == 1) return (vu)_mm256_srli_epi16((__m256i)quads, 8);
    static const vu kEvenBytes = vu{} + 0x00ff00ffu; // in memory: the tile leaves no register
    asm("vpand %1, %0, %0" : "+x"(quads) : "m"(kEvenBytes));
    return quads;
#else
    return (vu)_mm_srli_epi16((__m128i)(kPart == 0 ? quads << 8 & 0xff00ff00u : quads), 8);
#endif
  }

  template <int kPart>
  TRMFAST_INLINE vu columns(vu quads) {
#if defined(__AVX512BW__)
    constexpr __mmask32 all = 0xffffffffu;
    const __m512i high = kPart == 0 ? _mm512_maskz_slli_epi16(all, (__m512i)quads, 8) : (__m512i)quads;
    return (vu)_mm512_maskz_srai_epi16(all, high, 8);
#elif defined(__AVX2__)
    const __m256i high = kPart == 0 ? _mm256_slli_epi16((__m256i)quads, 8) : (__m256i)quads;
    return (vu)_mm256_srai_epi16(high, 8);
#else
    const __m128i high = kPart == 0 ? _mm_slli_epi16((__m128i)quads, 8) : (__m128i)quads;
    return (vu)_mm_srai_epi16(high, 8);
#endif
  }

  TRMFAST_INLINE vi multiply_add(vu row, vu columns, vi c) {
#if defined(__AVX512BW__)
    return c + (vi)_mm512_madd_epi16((__m512i)row, (__m512i)columns);
#elif defined(__AVX2__)
    return c + (vi)_mm256_madd_epi16((__m256i)row, (__m256i)columns);
#else
    return c + (vi)_mm_madd_epi16((__m128i)row, (__m128i)columns);
#endif
  }
};
#else
// One depth of the four in each part.
struct QuadStep {
  static constexpr int kParts = 4;

  template <int kPart>
  TRMFAST_INLINE vu row(vu quads) {
    return quads >> (8 * kPart) & 0xffu;
  }
  template <int kPart>
  TRMFAST_INLINE vu columns(vu quads) {
    return (vu)((vi)(quads << (24 - 8 * kPart)) >> 24);
  }
  TRMFAST_INLINE vi multiply_add(vu row, vu columns, vi c) { return c + (vi)row * (vi)columns; }
};
#endif

#if defined(__AVX512F__)
using Int8VectorDot = Int8Dot<QuadStep, 14, 2>;
#elif defined(__AVX2__)
using Int8VectorDot = Int8Dot<QuadStep, 6, 2>;
#else
using Int8VectorDot = Int8Dot<QuadStep, 4, 2>;
#endif

#if defined(__AMX_BF16__) || defined(__AMXBF16__) || defined(TRMFAST_EMULATE_AMX)
// TDPBUSD on the tiles of dot_amx.h, configured alike: 64 depths a step.
template <>
struct Dot<int8_t> {
  static constexpr int kRows = 32;
  static constexpr int kWholeRows = kTileHeight;
  static constexpr int kDepthStep = 64;

  static void run(const uint8_t* a, long lda, const int8_t* b, int depth, int rows, const int32_t* start,
                  Dequantize scales, float* c, long ldc, Prefetch next = {}) {
    multiply(a, lda, b, depth, rows, c, ldc, false, next);
    finish(rows, start, scales, c, ldc);
  }

  // c (+)= the bare sums, as int32.
  template <class Meanwhile = DoNothing>
  TRMFAST_INLINE void multiply(const uint8_t* a, long lda, const int8_t* b, int depth, int rows, float* c, long ldc,
                               bool accumulate, Prefetch next = {}, Meanwhile&& meanwhile = {}) {
    configure_tiles(rows);
    finish_stores();
    const int lower = rows - kTileHeight;
    if (lower > 0)
      tiles<true>(a, a + lower * lda, lda, b, depth, c, c + lower * ldc, ldc * 4, accumulate, next, meanwhile);
    else
      tiles<false>(a, a, lda, b, depth, c, c, ldc * 4, accumulate, next, meanwhile);
  }

  // What run() leaves in c, from the bare sums there.
  static void finish(int rows, const int32_t* start, Dequantize scales, float* c, long ldc) {
    for (int r = 0; r < rows; ++r) {
      for (int j = 0; j < kPanelColumns; j += kLanes) {
        vi sum, first;
        __builtin_memcpy(&sum, c + r * ldc + j, sizeof sum);
        __builtin_memcpy(&first, start + j, sizeof first);
        sum += first;
        if (scales.rows)
          store(c + r * ldc + j,
                __builtin_convertvector(sum, vf) * (load(scales.columns + j) * broadcast(scales.rows[r])));
        else
          __builtin_memcpy(c + r * ldc + j, &sum, sizeof sum);
      }
    }
  }

  static void release() { Dot<bf16>::release(); }

private:
  static constexpr long kPanelStride = kPanelColumns * 4;

  template <bool kLower, class Meanwhile>
  static void tiles(const uint8_t* upper, const uint8_t* lower, long a_stride, const int8_t* b, int depth,
                    float* c_upper, float* c_lower, long c_stride, bool accumulate, Prefetch next,
                    Meanwhile& meanwhile) {
    if (accumulate) {
      _tile_loadd(0, c_upper, c_stride);
      _tile_loadd(1, c_upper + 16, c_stride);
      if (kLower) {
        _tile_loadd(2, c_lower, c_stride);
        _tile_loadd(3, c_lower + 16, c_stride);
      }
    } else {
      _tile_zero(0);
      _tile_zero(1);
      if (kLower) {
        _tile_zero(2);
        _tile_zero(3);
      }
    }
    const long share = next.from ? next.bytes * kDepthStep / depth : 0;
    const char* ahead = static_cast<const char*>(next.from);
    for (int k = 0; k < depth; k += kDepthStep, b += kDepthStep * kPanelColumns) {
      for (const char* const end = ahead + share; ahead < end; ahead += 64) __builtin_prefetch(ahead, 0, 2);
      _tile_stream_loadd(4, upper + k, a_stride);
      _tile_loadd(6, b, kPanelStride);
      _tile_loadd(7, b + 64, kPanelStride);
      _tile_dpbusd(0, 4, 6);
      _tile_dpbusd(1, 4, 7);
      if (kLower) {
        _tile_stream_loadd(5, lower + k, a_stride);
        _tile_dpbusd(2, 5, 6);
        _tile_dpbusd(3, 5, 7);
      }
      meanwhile(k / kDepthStep);
    }
    _tile_stored(0, c_upper, c_stride);
    _tile_stored(1, c_upper + 16, c_stride);
    if (kLower) {
      _tile_stored(2, c_lower, c_stride);
      _tile_stored(3, c_lower + 16, c_stride);
    }
  }
};
#else
template <>
struct Dot<int8_t> : Int8VectorDot {};
#endif

} // namespace TRMFAST_NAMESPACE
} // namespace trmfast
