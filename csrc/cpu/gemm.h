// The schedule of a product: activations [rows, depth] times packed panels.  One panel (32 columns, 32 KB in bf16 at
// depth 512) stays in L1 while all row tiles stream past it; the epilogue takes every finished 32-wide tile from L1.
#pragma once

#include "pack.h"
#include "team.h"

namespace trmfast {
namespace TRMFAST_NAMESPACE {

// Length of the addition chains of an f32 product.  PyTorch's product has one chain up to a depth of 256 and two at
// 512. With half the depth, at least 32 and at most 128, the rounding is about 0.7 of that (root mean square; one chain
// at 512: 1.4).  A chain costs a pass over the tile: with four of them a product of depth 128 takes 10 % longer.
constexpr int chain_length(int depth) { return larger(32, smaller(128, ceil_div(depth, 2))); }

// c <- a times a panel, as Dot<T>::run.  bf16 operands need only one chain: their own rounding dominates the sum's.
TRMFAST_INLINE void multiply(const bf16* a, long lda, const bf16* panel, int depth, int rows, float* c, long ldc,
                             Prefetch next = {}) {
  Dot<bf16>::run(a, lda, panel, depth, rows, c, ldc, false, next);
}
TRMFAST_INLINE void multiply(const float* a, long lda, const float* panel, int depth, int rows, float* c, long ldc,
                             Prefetch next = {}) {
  const int chain = chain_length(depth), chains = ceil_div(depth, chain);
  const long share = next.bytes / chains;
  for (int i = 0; i < chains; ++i) {
    const int d = i * chain;
    const Prefetch part{next.from ? static_cast<const char*>(next.from) + i * share : nullptr, share};
    Dot<float>::run(a + d, lda, panel + static_cast<long>(d) * kPanel, smaller(chain, depth - d), rows, c, ldc, i > 0,
                    part);
  }
}

// epilogue(row, rows, panel, tile): tile is f32 [rows][32] of rows row.. and columns 32 * panel..; every (row tile,
// panel) is given to one thread of the team exactly once.  `tile` is scratch of the calling thread, Dot<T>::kRows * 32
// floats. Every call brings a share of the following panel into L2; matrices lie in the order of their use, so after
// the last panel that is the next matrix.
template <class T, class Epilogue>
void gemm(const Team& team, const T* a, long a_stride, int rows, const T* panels, int depth, int columns, float* tile,
          Epilogue&& epilogue) {
  const RowTiles tiles(rows, Dot<T>::kRows);
  const int padded = padded_depth<T>(depth);
  const long elements = panel_elements<T>(depth), share = elements / tiles.count;
  const Range range = team.split(ceil_div(columns, kPanel));
  for (int p = range.begin; p < range.end && !team.stopped(); ++p) {
    const T* panel = panels + p * elements;
    for (int i = 0; i < tiles.count; ++i) {
      const int row = tiles.begin(i), n = tiles.size(i);
      const Prefetch next{panel + elements + i * share, share * static_cast<long>(sizeof(T))};
      multiply(a + row * a_stride, a_stride, panel, padded, n, tile, kPanel, next);
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
