// Packing into the panels that the micro-kernels read: 32 columns wide, depth first; bf16 keeps pairs of depth
// together.
//   bf16  panel[depth / 2][32][2]        f32  panel[depth][32]
// A dword of a panel is one float or one pair of bf16, so packing X^T (columns of the panel are rows of X) is a
// transpose of dwords, and packing X (columns of the panel are columns of X) is a copy of floats or an interleave of
// two bf16 rows. Padding beyond the matrix is zeroed.
#pragma once

#include "dot.h"
#include "layout.h"
#include "simd.h"

namespace trmfast {
namespace TRMFAST_NAMESPACE {

template <class T> constexpr int elements_per_dword() { return 4 / static_cast<int>(sizeof(T)); }

// Depth of a product, padded to what the micro-kernel takes; a multiple of a dword for every element.
template <class T> constexpr int padded_depth(int depth) { return round_up(depth, Dot<T>::kDepthStep); }

template <class T> constexpr long panel_elements(int depth) {
  return static_cast<long>(padded_depth<T>(depth)) * kPanel;
}

// The whole matrix: depth x columns.
template <class T> constexpr long packed_elements(int depth, int columns) {
  return panel_elements<T>(depth) * ceil_div(columns, kPanel);
}

// Zeroes what products read beyond the last column: [columns, up to) of every row.  Buffers live longer than the
// sequences in them, so nothing is ever written there: the 0 x NaN of one sequence would reach all that follow.
template <class T> void clear_padding(T* x, int rows, int columns, long up_to, long stride) {
  if (!x || columns >= up_to) return;
  for (int t = 0; t < rows; ++t)
    __builtin_memset(static_cast<void*>(x + t * stride + columns), 0, static_cast<size_t>(up_to - columns) * sizeof(T));
}

// out[i][j] = in[j][i], 16 x 16 dwords.
TRMFAST_INLINE void transpose_16x16(const uint32_t (*in)[16], uint32_t* out, long out_stride) {
#if defined(__AVX512F__)
  __m512i r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(in[i]);
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  // r[4g + c] holds, in its 128-bit lane l, column 4l + c of rows 4g..4g+3.
  for (int c = 0; c < 4; ++c) {
    const __m512i a = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88), b = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd), e = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
    _mm512_storeu_si512(out + c * out_stride, _mm512_shuffle_i32x4(a, b, 0x88));
    _mm512_storeu_si512(out + (4 + c) * out_stride, _mm512_shuffle_i32x4(d, e, 0x88));
    _mm512_storeu_si512(out + (8 + c) * out_stride, _mm512_shuffle_i32x4(a, b, 0xdd));
    _mm512_storeu_si512(out + (12 + c) * out_stride, _mm512_shuffle_i32x4(d, e, 0xdd));
  }
#else
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) out[i * out_stride + j] = in[j][i];
#endif
}

// A row of floats, each times its factor.
struct ScaledRow {
  const float *values, *factors;
  explicit operator bool() const { return values != nullptr; }
  ScaledRow operator+(long i) const { return {values + i, factors + i}; }
};
TRMFAST_INLINE vf load(const ScaledRow& row) { return load(row.values) * load(row.factors); }
TRMFAST_INLINE vf load(const ScaledRow& row, int n) { return load(row.values, n) * load(row.factors, n); }

// Sixteen dwords of T: `valid` elements of a row, then zeros.
template <class T, class Source> TRMFAST_INLINE void row_dwords(Source src, int valid, uint32_t* out) {
  constexpr int kElements = 16 * elements_per_dword<T>();
  T* to = reinterpret_cast<T*>(out);
  if (valid >= kElements) {
    for (int i = 0; i < kElements; i += kLanes) store(to + i, load(src + i));
    return;
  }
  for (int i = 0; i < kElements; i += kLanes) store(to + i, load(src + i, larger(0, smaller(kLanes, valid - i))));
}

// Panel of X^T.  row(j) is row j of X (depth elements) for panel column j, or null for a zero column.
template <class T, class Row> void pack_transposed_panel(Row row, int depth, T* panel) {
  constexpr int kStep = 16 * elements_per_dword<T>();
  const int padded = padded_depth<T>(depth);
  uint32_t in[16][16], out[16][16];
  for (int half = 0; half < 2; ++half) {
    for (int d = 0; d < padded; d += kStep) {
      for (int j = 0; j < 16; ++j) {
        const auto source = row(half * 16 + j);
        if (source)
          row_dwords<T>(source + d, depth - d, in[j]);
        else
          for (int i = 0; i < 16; ++i) in[j][i] = 0;
      }
      uint32_t* to =
          reinterpret_cast<uint32_t*>(panel) + d / elements_per_dword<T>() * static_cast<long>(kPanel) + half * 16;
      const int dwords = smaller(kStep, padded - d) / elements_per_dword<T>();
      if (dwords == 16) {
        transpose_16x16(in, to, kPanel);
      } else {
        transpose_16x16(in, out[0], 16);
        for (int i = 0; i < dwords; ++i) __builtin_memcpy(to + static_cast<long>(i) * kPanel, out[i], sizeof out[i]);
      }
    }
  }
}

// Two rows of 32 columns as they stand in a panel: interleaved pairs (bf16) or one after the other (f32).
TRMFAST_INLINE void store_row_pair(bf16* panel, const float* even, const float* odd) {
  for (int j = 0; j < kPanel; j += kLanes) {
    const vu low = __builtin_convertvector(to_bf16_bits(load(even + j)), vu);
    const vu high = __builtin_convertvector(to_bf16_bits(load(odd + j)), vu);
    const vu pairs = low | high << 16;
    __builtin_memcpy(panel + 2 * j, &pairs, sizeof pairs);
  }
}
TRMFAST_INLINE void store_row_pair(float* panel, const float* even, const float* odd) {
  for (int j = 0; j < kPanel; j += kLanes) {
    store(panel + j, load(even + j));
    store(panel + kPanel + j, load(odd + j));
  }
}

// Up to 32 columns of one row as floats, zero beyond `columns`.
template <class Source> TRMFAST_INLINE void load_row(Source src, int columns, float* out) {
  for (int j = 0; j < kPanel; j += kLanes) {
    const int valid = larger(0, smaller(kLanes, columns - j));
    store(out + j, valid == kLanes ? load(src + j) : load(src + j, valid));
  }
}

// Panel of X.  row(k) is row k of X from the panel's first column on, or null for a zero row.
template <class T, class Row> void pack_panel(Row row, int depth, int columns, T* panel) {
  const int padded = padded_depth<T>(depth);
  float rows[2][kPanel];
  for (int k = 0; k < padded; k += 2) {
    for (int i = 0; i < 2; ++i) {
      const auto source = k + i < depth ? row(k + i) : decltype(row(0)){};
      if (source)
        load_row(source, columns, rows[i]);
      else
        for (int j = 0; j < kPanel; ++j) rows[i][j] = 0.0f;
    }
    if (k + 1 < padded || sizeof(T) == 2)
      store_row_pair(panel + static_cast<long>(k) * kPanel, rows[0], rows[1]);
    else // the last row of an odd f32 depth
      __builtin_memcpy(panel + static_cast<long>(k) * kPanel, rows[0], sizeof rows[0]);
  }
}

// Panels of X^T: X is `columns` rows of `depth`, leading dimension `stride`.
template <class T> void pack_transposed(const T* x, long stride, int columns, int depth, T* panels) {
  for (int first = 0; first < columns; first += kPanel, panels += panel_elements<T>(depth))
    pack_transposed_panel<T>([&](int j) { return first + j < columns ? x + (first + j) * stride : nullptr; }, depth,
                             panels);
}

// `columns` <= 16 columns of consecutive rows of x as dwords, one row (f32) or a pair of rows (bf16), zero beyond.
TRMFAST_INLINE void row_pair_dwords(const bf16* x, long stride, int rows, int columns, uint32_t* out) {
  for (int j = 0; j < 16; j += kLanes) {
    vu pairs = {};
    for (int i = 0; i < 2; ++i) {
      vu16 bits = {};
      const int n = i < rows ? larger(0, smaller(kLanes, columns - j)) : 0;
      if (n == kLanes)
        __builtin_memcpy(&bits, x + i * stride + j, sizeof bits);
      else if (n > 0)
        __builtin_memcpy(&bits, x + i * stride + j, sizeof(bf16) * static_cast<size_t>(n));
      pairs |= __builtin_convertvector(bits, vu) << (16 * i);
    }
    __builtin_memcpy(out + j, &pairs, sizeof pairs);
  }
}
TRMFAST_INLINE void row_pair_dwords(const float* x, long, int rows, int columns, uint32_t* out) {
  for (int j = 0; j < 16; j += kLanes)
    store(reinterpret_cast<float*>(out) + j, rows > 0 ? load(x + j, larger(0, smaller(kLanes, columns - j))) : vf{});
}

// Panels of X: X is `depth` rows of `columns`.
template <class T> void pack_rows(const T* x, long stride, int depth, int columns, T* panels) {
  uint32_t* to = reinterpret_cast<uint32_t*>(panels);
  for (int first = 0; first < columns; first += kPanel) {
    for (int k = 0; k < padded_depth<T>(depth); k += elements_per_dword<T>()) {
      for (int c = first; c < first + kPanel; c += 16, to += 16)
        row_pair_dwords(x + k * stride + c, stride, depth - k, columns - c, to);
    }
  }
}

// to[c][r] = x[r][c]: rows x columns, each output row zero from `rows` up to the padded depth.
template <class T> void transpose(const T* x, long stride, int rows, int columns, T* to, long to_stride) {
  constexpr int kPair = elements_per_dword<T>();
  constexpr int kStep = 16 * kPair;
  const int padded = padded_depth<T>(rows);
  uint32_t in[16][16], out[16][16];
  for (int c = 0; c < columns; c += 16) {
    const int wide = smaller(16, columns - c);
    for (int r = 0; r < padded; r += kStep) {
      for (int i = 0; i < 16; ++i)
        row_pair_dwords(x + (r + i * kPair) * stride + c, stride, rows - r - i * kPair, wide, in[i]);
      transpose_16x16(in, out[0], 16);
      const size_t tall = static_cast<size_t>(smaller(kStep, padded - r)) * sizeof(T);
      T* first = to + c * to_stride + r;
      if (tall == 64 && wide == 16)
        for (int j = 0; j < 16; ++j) __builtin_memcpy(first + j * to_stride, out[j], 64);
      else
        for (int j = 0; j < wide; ++j) __builtin_memcpy(first + j * to_stride, out[j], tall);
    }
  }
}

} // namespace TRMFAST_NAMESPACE
} // namespace trmfast
