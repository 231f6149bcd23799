// Matrix product of bf16, AMX (TDPBF16PS): up to 32 rows x 32 columns on 2 x 2 tiles, 32 depths a step.
//
//   tiles      columns 0-15   columns 16-31      rows
//              b: 6           b: 7
//   a: 4       c: 0           c: 1               the first 16
//   a: 5       c: 2           c: 3               the last 16
//
// A step is 2 loads of a, 2 of b and 4 products of 16 cycles each; with up to 16 rows 1, 2 and 2.  a is streamed: its
// loads (TILELOADDT1) leave the 32 KB panel in L1. The depth is a multiple of 32: pad with zeros.
//
// Tiles are always 16 rows high, so with 17 to 31 rows the lower ones begin inside the upper: those rows are multiplied
// twice, with the same results.  Lower tiles of fewer rows were no faster and would need another configuration:
// LDTILECFG takes 80 ns, a sixth of a call of depth 512 (measured on an Emerald Rapids Xeon).  Calls with fewer than 16
// rows still have their own.
//
// The configuration belongs to the thread: release() gives the tiles back. Between the first run() of a region and
// release(), code that configures tiles itself (oneDNN) may run on the thread only if forget() follows.
//
// While the tiles are busy, the vector units are idle. run() calls meanwhile(step) at every step, see gemm_beside(); it
// must not write what run() reads.
#pragma once

#if defined(__AVX512F__)
#include "dot_avx512.h"
#elif defined(__AVX2__)
#include "dot_avx2.h"
#else
#include "dot_portable.h"
#endif

#ifdef TRMFAST_EMULATE_AMX
#include "amx_emulated.h"
#endif

namespace trmfast {
namespace TRMFAST_NAMESPACE {

// The rows of a tile.
constexpr int kTileHeight = 16;

// The rows that this thread's tiles are configured for; 0: none of ours.
inline thread_local int configured_rows = 0;

// GCC's tile intrinsics do not tell the compiler which memory they read.
TRMFAST_INLINE void finish_stores() { asm volatile("" ::: "memory"); }

__attribute__((noinline)) inline void load_configuration(int tile_rows) {
  struct alignas(64) {
    uint8_t palette, start_row, reserved[14];
    uint16_t column_bytes[16];
    uint8_t rows[16];
  } config = {};
  config.palette = 1;
  for (int t = 0; t < 8; ++t) {
    config.rows[t] = static_cast<uint8_t>(t < 6 ? tile_rows : kTileHeight);
    config.column_bytes[t] = 64;
  }
  finish_stores();
  _tile_loadconfig(&config);
  configured_rows = tile_rows;
}

// For products of `rows` rows.
TRMFAST_INLINE void configure_tiles(int rows) {
  const int tile_rows = rows < kTileHeight ? rows : kTileHeight;
  if (tile_rows != configured_rows) load_configuration(tile_rows);
}

template <>
struct Dot<bf16> {
  static constexpr int kRows = 32;
  static constexpr int kWholeRows = kTileHeight;
  static constexpr int kDepthStep = 32;

  template <class Meanwhile = DoNothing>
  TRMFAST_INLINE void run(const bf16* a, long lda, const bf16* b, int depth, int rows, float* c, long ldc,
                          bool accumulate, Prefetch next = {}, Meanwhile&& meanwhile = {}) {
    configure_tiles(rows);
    finish_stores();
    if (rows > kTileHeight) {
      const int lower = rows - kTileHeight;
      four_tiles(a, a + lower * lda, lda * 2, b, depth, c, c + lower * ldc, ldc * 4, accumulate, next, meanwhile);
    } else {
      two_tiles(a, lda * 2, b, depth, c, ldc * 4, accumulate, next, meanwhile);
    }
  }

  // 32 rows, where the results of the last 16 are elsewhere.
  template <class Meanwhile>
  TRMFAST_INLINE void run_halves(const bf16* a, long lda, const bf16* b, int depth, float* upper, float* lower,
                                 long ldc, bool accumulate, Prefetch next, Meanwhile&& meanwhile) {
    configure_tiles(kRows);
    finish_stores();
    four_tiles(a, a + kTileHeight * lda, lda * 2, b, depth, upper, lower, ldc * 4, accumulate, next, meanwhile);
  }

  static void forget() { configured_rows = 0; }

  static void release() {
    if (configured_rows != 0) _tile_release();
    configured_rows = 0;
  }

private:
  static constexpr long kPanelStride = kPanelColumns * 4; // bytes between the rows (of pairs) of a tile of b
  static constexpr long kStep = 16 * kPanelColumns * 2;   // elements of b in a step
  static constexpr int kHalf = 16 * 2;                    // elements from columns 0-15 of b to 16-31

  TRMFAST_INLINE void prefetch(const void* from, long offset, long bytes) {
    const char* p = static_cast<const char*>(from) + offset;
    for (const char* const end = p + bytes; p < end; p += 64) __builtin_prefetch(p, 0, 2);
  }

  // The strides are in bytes.
  template <class Meanwhile>
  static void four_tiles(const bf16* a_upper, const bf16* a_lower, long a_stride, const bf16* b, int depth,
                         float* c_upper, float* c_lower, long c_stride, bool accumulate, Prefetch next,
                         Meanwhile& meanwhile) {
    if (accumulate) {
      _tile_loadd(0, c_upper, c_stride);
      _tile_loadd(1, c_upper + 16, c_stride);
      _tile_loadd(2, c_lower, c_stride);
      _tile_loadd(3, c_lower + 16, c_stride);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    const long share = next.bytes * kDepthStep / depth;
    for (int k = 0; k < depth; k += kDepthStep, b += kStep) {
      prefetch(next.from, k / kDepthStep * share, share);
      _tile_stream_loadd(4, a_upper + k, a_stride);
      _tile_loadd(6, b, kPanelStride);
      _tile_loadd(7, b + kHalf, kPanelStride);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_stream_loadd(5, a_lower + k, a_stride);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
      meanwhile(k / kDepthStep);
    }
    _tile_stored(0, c_upper, c_stride);
    _tile_stored(1, c_upper + 16, c_stride);
    _tile_stored(2, c_lower, c_stride);
    _tile_stored(3, c_lower + 16, c_stride);
  }

  template <class Meanwhile>
  static void two_tiles(const bf16* a, long a_stride, const bf16* b, int depth, float* c, long c_stride,
                        bool accumulate, Prefetch next, Meanwhile& meanwhile) {
    if (accumulate) {
      _tile_loadd(0, c, c_stride);
      _tile_loadd(1, c + 16, c_stride);
    } else {
      _tile_zero(0);
      _tile_zero(1);
    }
    const long share = next.bytes * kDepthStep / depth;
    for (int k = 0; k < depth; k += kDepthStep, b += kStep) {
      prefetch(next.from, k / kDepthStep * share, share);
      _tile_stream_loadd(4, a + k, a_stride);
      _tile_loadd(6, b, kPanelStride);
      _tile_loadd(7, b + kHalf, kPanelStride);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      meanwhile(k / kDepthStep);
    }
    _tile_stored(0, c, c_stride);
    _tile_stored(1, c + 16, c_stride);
  }
};

} // namespace TRMFAST_NAMESPACE
} // namespace trmfast
