// The schedule of a product: activations [rows, depth] times packed panels.  One panel (32 columns, 32 KB in bf16 at
// depth 512) stays in L1 while all row tiles stream past it; the epilogue takes every finished 32-wide tile from L1, or
// with AMX and deep panels from L2.
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

// A tile whose epilogue is still to run.
struct FinishedTile {
  int row, rows, panel;
  float* values;
};

// Depth whose panel, 32 KB, stays in L1 beside the rows that stream past it.
template <class T> constexpr int kDepthInL1 = 1024 / sizeof(T);

// Floats of the tiles that gemm() takes as scratch for products of up to `rows` rows.
template <class T> constexpr long tile_floats(int rows) {
  return static_cast<long>(Dot<T>::kWholeRows > 1 ? larger(2, ceil_div(rows, Dot<T>::kRows)) : 1) * Dot<T>::kRows *
         kPanel;
}

// gemm() where matrix and vector units work beside each other (AMX).  An epilogue has more instructions than the core
// looks ahead, so a product behind it starts late.  Therefore it is dealt out over the steps of the next tile's
// product: it gets a tile's rows in pieces, and must not write what that product reads.  A deep panel is taken in parts
// that stay in L1, with the sums of all row tiles in `scratch`, tile_floats<T>().
//
// product(row, rows, panel, from, depth, tile, next, meanwhile): tile (+)= rows row.. times a panel, over the depths
// `from` to from + depth; it adds unless `from` is 0, and calls meanwhile(step) at every step.
template <class T, class Product, class Epilogue>
void gemm_beside(const Team& team, int rows, const T* panels, int depth, int columns, float* scratch, Product&& product,
                 Epilogue&& epilogue) {
  constexpr int kStep = Dot<T>::kDepthStep;
  const RowTiles<Dot<T>> tiles(rows);
  const int padded = padded_depth<T>(depth), parts = tiles.count > 1 ? ceil_div(padded, kDepthInL1<T>) : 1,
            part = round_up(ceil_div(padded, parts), kStep), buffers = parts > 1 ? tiles.count : 2;
  const long elements = panel_elements<T>(depth), share = elements / (static_cast<long>(tiles.count) * parts);
  const Range range = team.split(ceil_div(columns, kPanel));
  FinishedTile last = {};
  int buffer = 0;
  for (int p = range.begin; p < range.end && !team.stopped(); ++p) {
    const T* next = panels + (p + 1) * elements;
    for (int from = 0; from < padded; from += part)
      for (int i = 0; i < tiles.count; ++i, next += share) {
        const int row = tiles.begin(i), n = tiles.size(i), lead = tiles.lead(i), size = smaller(part, padded - from);
        float* const tile = scratch + buffer * Dot<T>::kRows * kPanel;
        const int each = ceil_div(last.rows, size / kStep);
        product(row - lead, lead + n, p, from, size, tile, Prefetch{next, share * static_cast<long>(sizeof(T))},
                [&](int step) {
                  const int first = step * each, some = smaller(each, last.rows - first);
                  if (some > 0) epilogue(last.row + first, some, last.panel, last.values + first * kPanel);
                });
        last = {row, from + part < padded ? 0 : n, p, tile + lead * kPanel};
        buffer = buffer + 1 < buffers ? buffer + 1 : 0;
      }
  }
  if (last.rows) epilogue(last.row, last.rows, last.panel, last.values);
}

// epilogue(row, rows, panel, tile): tile is f32 [rows][32] of rows row.. and columns 32 * panel..; every row of every
// panel is given to one thread of the team exactly once.  `tile` is scratch of the calling thread, tile_floats<T>().
// Every call brings a share of the following panel into L2; matrices lie in the order of their use, so after the last
// panel that is the next matrix.
template <class T, class Epilogue>
void gemm(const Team& team, const T* a, long a_stride, int rows, const T* panels, int depth, int columns, float* tile,
          Epilogue&& epilogue) {
  if constexpr (Dot<T>::kWholeRows > 1) {
    const auto product = [&](int row, int n, int p, int from, int size, float* c, Prefetch next, auto&& meanwhile) {
      Dot<T>::run(a + row * a_stride + from, a_stride, panels + p * panel_elements<T>(depth) + from * kPanel, size, n,
                  c, kPanel, from > 0, next, meanwhile);
    };
    gemm_beside(team, rows, panels, depth, columns, tile, product, epilogue);
  } else {
    const RowTiles<Dot<T>> tiles(rows);
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
}

// Rows of one tile: fn(row of the activations, row of the tile as 32 floats).
template <class Fn> TRMFAST_INLINE void for_rows(int row, int rows, const float* tile, Fn&& fn) {
  for (int r = 0; r < rows; ++r) fn(row + r, tile + r * kPanel);
}

} // namespace TRMFAST_NAMESPACE
} // namespace trmfast
