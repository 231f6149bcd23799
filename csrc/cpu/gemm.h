// The schedule of a product: activations [rows, depth] times packed panels.  One panel (32 columns, 32 KB in bf16 at depth
// 512) stays in L1 while all row tiles stream past it; the epilogue takes every finished 32-wide tile from L1.
#pragma once

#include "pack.h"
#include "team.h"

namespace trmfast {
namespace TRMFAST_NAMESPACE {

// epilogue(row, rows, panel, tile): tile is f32 [rows][32] of rows row.. and columns 32 * panel..; every (row tile, panel)
// is given to one thread of the team exactly once.  `tile` is scratch of the calling thread, Dot<T>::kRows * 32 floats.
// Every call brings a share of the following panel into L2; matrices lie in the order of their use, so after the last panel
// that is the next matrix.
template <class T, class Epilogue>
void gemm(const Team& team, const T* a, long a_stride, int rows, const T* panels, int depth, int columns, float* tile,
          Epilogue&& epilogue) {
  const RowTiles tiles(rows, Dot<T>::kRows);
  const int padded = padded_depth<T>(depth);
  const long elements = panel_elements<T>(depth), share = elements / tiles.count;
  const Range range = team.split(ceil_div(columns, kPanel));
  for (int p = range.begin; p < range.end; ++p) {
    const T* panel = panels + p * elements;
    for (int i = 0; i < tiles.count; ++i) {
      const int row = tiles.begin(i), n = tiles.size(i);
      const Prefetch next{panel + elements + i * share, share * static_cast<long>(sizeof(T))};
      Dot<T>::run(a + row * a_stride, a_stride, panel, padded, n, tile, kPanel, false, next);
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
