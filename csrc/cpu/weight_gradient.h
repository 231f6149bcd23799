// Weight gradients, f32, added up over every (update, sequence) in the store at once:
//
//   grad[n, c] += sum over tokens of dy[t, n] x[t, c]
//
// x is packed into panels that all threads share; then every thread takes blocks of 64 outputs, transposes their dy and
// multiplies in chunks of 512 tokens, so that a chunk of a panel (32 KB in bf16) is read from L1 by all tiles of the
// block. A thread owns the rows that it adds to: no copy per thread, and the same sums for any number of threads.
#pragma once

#include "gemm.h"
#include "weights.h"

namespace trmfast {
namespace TRMFAST_NAMESPACE {

constexpr int kGradientRows = 64;
constexpr int kGradientChunk = 512;

// tiles += sums, n x 32
TRMFAST_INLINE void add_sums(int n, const float* sums, float* tiles) {
  for (int j = 0; j < n * kPanel; j += kLanes) store(tiles + j, load(tiles + j) + load(sums + j));
}

template <class T> struct WeightGradientScratch {
  T* rows;      // dy^T of a block, [64, stride]
  float* tiles; // [64, 32]
  float* sums;  // of one chunk, [kRows, 32]
  long stride;

  WeightGradientScratch(Arena& arena, long tokens)
      : rows(arena.take<T>(kGradientRows * row_stride(static_cast<int>(tokens)))),
        tiles(arena.take<float>(kGradientRows * kPanel)), sums(arena.take<float>(Dot<T>::kRows * kPanel)),
        stride(row_stride(static_cast<int>(tokens))) {}
};

// tiles[0 .. n) <- sum over chunks of left(chunk) [n, depth(chunk)] times the panel right(chunk).  Every chunk is
// summed by itself first: one chain over all tokens would round far more often than autograd's sum over the updates
// does.
template <class T, class Left, class Right, class Depth>
void multiply_chunks(int n, int chunks, long left_stride, const WeightGradientScratch<T>& scratch, Left left,
                     Right right, Depth depth) {
  const RowTiles rows(n, Dot<T>::kRows);
  for (int chunk = 0; chunk < chunks; ++chunk)
    for (int i = 0; i < rows.count; ++i) {
      float* tile = scratch.tiles + rows.begin(i) * kPanel;
      const T* panel = right(chunk);
      const long elements = static_cast<long>(depth(chunk)) * kPanel, share = elements / rows.count;
      const Prefetch next{panel + elements + i * share, share * static_cast<long>(sizeof(T))};
      multiply(left(chunk) + rows.begin(i) * left_stride, left_stride, panel, depth(chunk), rows.size(i),
               chunk == 0 ? tile : scratch.sums, kPanel, next);
      if (chunk > 0) add_sums(rows.size(i), scratch.sums, tile);
    }
}

// A gradient [outputs, inputs] in f32; `fresh`: nothing has been written yet, so the first sum is stored, not added.
struct Gradient {
  float* values;
  bool fresh;
};

// grad[row_of(first + r), c ..] += tiles[r]; rows without a place in the weight are padding.
template <class RowOf>
void add_to_gradient(int first, int n, int c, int columns, const float* tiles, const Gradient& grad, RowOf row_of) {
  const int wide = smaller(kPanel, columns - c);
  for (int r = 0; r < n; ++r) {
    const int row = row_of(first + r);
    if (row < 0) continue;
    float* to = grad.values + static_cast<long>(row) * columns + c;
    for (int j = 0; j < wide; j += kLanes) {
      const int lanes = smaller(kLanes, wide - j);
      const vf value = load(tiles + r * kPanel + j);
      store(to + j, grad.fresh ? value : value + load(to + j, lanes), lanes);
    }
  }
}

// dy: [tokens, outputs] in packed order, x: [tokens, inputs]; row_of(n) is the weight's row of packed output n, or -1.
// panels: shared by the team, packed_elements(tokens, inputs).
template <class T, class RowOf>
void weight_gradient(const Team& team, const T* dy, long dy_stride, int outputs, const T* x, long x_stride, int inputs,
                     int tokens, const Gradient& grad, T* panels, const WeightGradientScratch<T>& scratch,
                     RowOf row_of) {
  const long elements = panel_elements<T>(tokens);
  const int num_panels = ceil_div(inputs, kPanel), depth = padded_depth<T>(tokens);
  const Range packing = team.split(num_panels);
  for (int p = packing.begin; p < packing.end; ++p)
    pack_rows(x + p * kPanel, x_stride, tokens, smaller(kPanel, inputs - p * kPanel), panels + p * elements);
  team.sync();
  const Range blocks = team.split(ceil_div(outputs, kGradientRows));
  for (int block = blocks.begin; block < blocks.end && !team.stopped(); ++block) {
    const int first = block * kGradientRows, n = smaller(kGradientRows, outputs - first);
    transpose(dy + first, dy_stride, tokens, n, scratch.rows, scratch.stride);
    for (int p = 0; p < num_panels && !team.stopped(); ++p) {
      multiply_chunks<T>(
          n, ceil_div(depth, kGradientChunk), scratch.stride, scratch,
          [&](int chunk) { return scratch.rows + chunk * kGradientChunk; },
          [&](int chunk) { return panels + p * elements + static_cast<long>(chunk) * kGradientChunk * kPanel; },
          [&](int chunk) { return smaller(kGradientChunk, depth - chunk * kGradientChunk); });
      add_to_gradient(first, n, p * kPanel, inputs, scratch.tiles, grad, row_of);
    }
  }
  team.sync();
}

// The mlp_t mixer: grad[n, c] += sum over sequences and channels of dy[s, n, channel] x[s, c, channel].
// dy: [sequences, outputs, stride], x: [sequences, inputs, stride], both with the channels of a sequence as columns.
template <class T>
void sequence_weight_gradient(const Team& team, const T* dy, int outputs, const T* x, int inputs, long stride,
                              int width, int sequences, const Gradient& grad, T* panels,
                              const WeightGradientScratch<T>& scratch) {
  const long elements = panel_elements<T>(width);
  const int num_panels = ceil_div(inputs, kPanel);
  const Range packing = team.split(sequences * num_panels);
  for (int item = packing.begin; item < packing.end; ++item) {
    const int sequence = item / num_panels, c = item % num_panels * kPanel;
    pack_transposed(x + (static_cast<long>(sequence) * inputs + c) * stride, stride, smaller(kPanel, inputs - c), width,
                    panels + item * elements);
  }
  team.sync();
  const Range blocks = team.split(ceil_div(outputs, kGradientRows));
  for (int block = blocks.begin; block < blocks.end && !team.stopped(); ++block) {
    const int first = block * kGradientRows, n = smaller(kGradientRows, outputs - first);
    for (int p = 0; p < num_panels && !team.stopped(); ++p) {
      multiply_chunks<T>(
          n, sequences, stride, scratch,
          [&](int sequence) { return dy + (static_cast<long>(sequence) * outputs + first) * stride; },
          [&](int sequence) { return panels + (static_cast<long>(sequence) * num_panels + p) * elements; },
          [&](int) { return padded_depth<T>(width); });
      add_to_gradient(first, n, p * kPanel, inputs, scratch.tiles, grad, [](int row) { return row; });
    }
  }
  team.sync();
}

} // namespace TRMFAST_NAMESPACE
} // namespace trmfast
