// The schedule of a product: activations [rows, depth] times packed panels.  One panel (32 columns, 32 KB in bf16 at depth
// 512) stays in L1 while all row tiles stream past it; the epilogue takes every finished 32-wide tile from L1.
#pragma once

#include "pack.h"
#include "team.h"

namespace trmfast {
namespace TRMFAST_NAMESPACE {

// Brings part `part` of `parts` of the next panel into L2 while the present one is multiplied.
template <class T> TRMFAST_INLINE void prefetch_part(const T* panel, long elements, int part, int parts) {
  const char* begin = reinterpret_cast<const char*>(panel + elements * part / parts);
  const char* end = reinterpret_cast<const char*>(panel + elements * (part + 1) / parts);
  for (const char* line = begin; line < end; line += 64) __builtin_prefetch(line, 0, 2);
}

// epilogue(row, rows, panel, tile): tile is f32 [rows][32] of rows row.. and columns 32 * panel..; every (row tile, panel)
// is given to one thread of the team exactly once.  `tile` is scratch of the calling thread, Dot<T>::kRows * 32 floats.
template <class T, class Epilogue>
void gemm(const Team& team, const T* a, long a_stride, int rows, const T* panels, int depth, int columns, float* tile,
          Epilogue&& epilogue) {
  const RowTiles tiles(rows, Dot<T>::kRows);
  const int padded = padded_depth<T>(depth), num_panels = ceil_div(columns, kPanel);
  const long elements = panel_elements<T>(depth);
  const Range range = team.split(num_panels);
  for (int p = range.begin; p < range.end; ++p) {
    const T* panel = panels + p * elements;
    for (int i = 0; i < tiles.count; ++i) {
      const int row = tiles.begin(i), n = tiles.size(i);
      if (p + 1 < range.end) prefetch_part(panel + elements, elements, i, tiles.count);
      Dot<T>::run(a + row * a_stride, a_stride, panel, padded, n, tile, kPanel, false);
      epilogue(row, n, p, tile);
    }
  }
}

// Rows of one tile: fn(row of the activations, row of the tile as 32 floats).
template <class Fn> TRMFAST_INLINE void for_rows(int row, int rows, const float* tile, Fn&& fn) {
  for (int r = 0; r < rows; ++r) fn(row + r, tile + r * kPanel);
}

} // namespace TRMFAST_NAMESPACE
} // namespace trmfast
