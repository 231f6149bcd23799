// Weight gradients, f32, added up over every (update, sequence) in the store at once:
//
//   grad[n, c] += sum over tokens of dy[t, n] x[t, c]
//
// x is packed into panels that all threads share; then every thread takes blocks of 64 outputs, transposes their dy and
// multiplies in chunks of up to 512 tokens, so that a chunk of a panel (32 KB in bf16) is read from L1 by all tiles of
// the block. A thread owns the rows that it adds to: no copy per thread.
//
// The sums are the same for any number of threads and of slots in the store: a chunk never crosses its group of slots,
// groups are counted from a net's first update, and chunks are added to the gradient in order.
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

// Groups of tokens, each padded to the depth that a product takes, and their chunks.  The last group may be shorter.
template <class T> struct TokenChunks {
  int group, tokens;   // of a whole group, and in all
  int padded;          // depth of a whole group
  int step, per_group; // depth of a chunk, and chunks of a whole group
  int groups, count;   // groups and chunks in all

  TokenChunks(int group, int tokens)
      : group(group), tokens(tokens), padded(padded_depth<T>(group)),
        step(round_up(ceil_div(padded, ceil_div(padded, kGradientChunk)), kPanel)), per_group(ceil_div(padded, step)),
        groups(ceil_div(tokens, group)),
        count(tokens / group * per_group + ceil_div(padded_depth<T>(tokens % group), step)) {}
  int tokens_of(int g) const { return smaller(group, tokens - g * group); }
  long depth() const { return static_cast<long>(groups) * padded; }
  // A chunk's place in the depth of all groups, and its own depth.
  long begin(int chunk) const {
    return static_cast<long>(chunk / per_group) * padded + static_cast<long>(chunk % per_group) * step;
  }
  int size(int chunk) const {
    return smaller(step, padded_depth<T>(tokens_of(chunk / per_group)) - chunk % per_group * step);
  }
};

template <class T> struct WeightGradientScratch {
  T* rows;      // dy^T of a block, [64, stride]
  float* tiles; // [64, 32]
  float* sums;  // of one chunk, [kRows, 32]
  long stride;

  // depth: TokenChunks::depth of a full store
  WeightGradientScratch(Arena& arena, long depth)
      : rows(arena.take<T>(kGradientRows * row_stride(static_cast<int>(depth)))),
        tiles(arena.take<float>(kGradientRows * kPanel)), sums(arena.take<float>(Dot<T>::kRows * kPanel)),
        stride(row_stride(static_cast<int>(depth))) {}
};

// tiles[0 .. n) += sum over chunks of left(chunk) [n, depth(chunk)] times the panel right(chunk); `fresh`: the tiles
// hold nothing yet.  Every chunk is summed separately first: one chain over all tokens would round far more often
// than autograd's sum over the updates does.
template <class T, class Left, class Right, class Depth>
void multiply_chunks(int n, int chunks, bool fresh, long left_stride, const WeightGradientScratch<T>& scratch,
                     Left left, Right right, Depth depth) {
  const RowTiles<Dot<T>> rows(n);
  for (int chunk = 0; chunk < chunks; ++chunk)
    for (int i = 0; i < rows.count; ++i) {
      float* tile = scratch.tiles + rows.begin(i) * kPanel;
      const T* panel = right(chunk);
      const long elements = static_cast<long>(depth(chunk)) * kPanel, share = elements / rows.count;
      const Prefetch next{panel + elements + i * share, share * static_cast<long>(sizeof(T))};
      multiply(left(chunk) + rows.begin(i) * left_stride, left_stride, panel, depth(chunk), rows.size(i),
               fresh && chunk == 0 ? tile : scratch.sums, kPanel, next);
      if (!fresh || chunk > 0) add_sums(rows.size(i), scratch.sums, tile);
    }
}

// A gradient [outputs, inputs] in f32; `fresh`: nothing has been written yet, so the first sum is stored, not added.
struct Gradient {
  float* values;
  bool fresh;
};

// fn(to, tile, lanes) for the vectors of grad[row_of(first + r), c ..] and tiles[r]; rows without a place in the weight
// are padding.
template <class RowOf, class Fn>
TRMFAST_INLINE void for_gradient(int first, int n, int c, int columns, float* tiles, const Gradient& grad, RowOf row_of,
                                 Fn&& fn) {
  const int wide = smaller(kPanel, columns - c);
  for (int r = 0; r < n; ++r) {
    const int row = row_of(first + r);
    if (row < 0) continue;
    float* to = grad.values + static_cast<long>(row) * columns + c;
    for (int j = 0; j < wide; j += kLanes) fn(to + j, tiles + r * kPanel + j, smaller(kLanes, wide - j));
  }
}

// Adds the chunks to rows first.. (n of them) and columns c.. of a gradient.
template <class T, class RowOf, class Left, class Right, class Depth>
void add_chunks(int first, int n, int c, int columns, const Gradient& grad, RowOf row_of, int chunks, long left_stride,
                const WeightGradientScratch<T>& scratch, Left left, Right right, Depth depth) {
  if (!grad.fresh)
    for_gradient(first, n, c, columns, scratch.tiles, grad, row_of,
                 [](const float* from, float* tile, int lanes) { store(tile, load_lanes(from, lanes)); });
  multiply_chunks(n, chunks, grad.fresh, left_stride, scratch, left, right, depth);
  for_gradient(first, n, c, columns, scratch.tiles, grad, row_of,
               [](float* to, const float* tile, int lanes) { store_lanes(to, load(tile), lanes); });
}

// dy: [tokens, outputs] in packed order, x: [tokens, inputs]; row_of(n) is the weight's row of packed output n, or -1.
// panels: shared by the team, 32 x the depth of the chunks for every 32 inputs.
template <class T, class RowOf>
void weight_gradient(const Team& team, const T* dy, long dy_stride, int outputs, const T* x, long x_stride, int inputs,
                     const TokenChunks<T>& chunks, const Gradient& grad, T* panels,
                     const WeightGradientScratch<T>& scratch, RowOf row_of) {
  const long elements = chunks.depth() * kPanel;
  const int num_panels = ceil_div(inputs, kPanel);
  const Range packing = team.split(num_panels);
  for (int p = packing.begin; p < packing.end; ++p)
    for (int g = 0; g < chunks.groups; ++g)
      pack_rows(x + static_cast<long>(g) * chunks.group * x_stride + p * kPanel, x_stride, chunks.tokens_of(g),
                smaller(kPanel, inputs - p * kPanel),
                panels + p * elements + static_cast<long>(g) * chunks.padded * kPanel);
  team.sync();
  const Range blocks = team.split(ceil_div(outputs, kGradientRows));
  for (int block = blocks.begin; block < blocks.end && !team.stopped(); ++block) {
    const int first = block * kGradientRows, n = smaller(kGradientRows, outputs - first);
    for (int g = 0; g < chunks.groups; ++g)
      transpose(dy + static_cast<long>(g) * chunks.group * dy_stride + first, dy_stride, chunks.tokens_of(g), n,
                scratch.rows + static_cast<long>(g) * chunks.padded, scratch.stride);
    for (int p = 0; p < num_panels && !team.stopped(); ++p)
      add_chunks<T>(
          first, n, p * kPanel, inputs, grad, row_of, chunks.count, scratch.stride, scratch,
          [&](int chunk) { return scratch.rows + chunks.begin(chunk); },
          [&](int chunk) { return panels + p * elements + chunks.begin(chunk) * kPanel; },
          [&](int chunk) { return chunks.size(chunk); });
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
    for (int p = 0; p < num_panels && !team.stopped(); ++p)
      add_chunks<T>(
          first, n, p * kPanel, inputs, grad, [](int row) { return row; }, sequences, stride, scratch,
          [&](int sequence) { return dy + (static_cast<long>(sequence) * outputs + first) * stride; },
          [&](int sequence) { return panels + (static_cast<long>(sequence) * num_panels + p) * elements; },
          [&](int) { return padded_depth<T>(width); });
  }
  team.sync();
}

} // namespace TRMFAST_NAMESPACE
} // namespace trmfast
