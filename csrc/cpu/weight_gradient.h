// Weight gradients, f32, added up over every (update, sequence) in the store at once:
//
//   grad[n, c] += sum over tokens of dy[t, n] x[t, c]
//
// x is packed into panels that all threads share; then every thread takes blocks of outputs, transposes their dy and
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

// Most outputs of a block.  AMX multiplies 64 x 32 in less time than L3 takes to deliver the chunk of the panel: 256
// use it four times as often.
template <class T> constexpr int gradient_rows() { return Dot<T>::kWholeRows > 1 ? 256 : 64; }
// As many of them as leave most of L2 to other data: 256 for 776 tokens, in bf16 0.4 MB.
template <class T> int gradient_rows(long depth) {
  const int fit = static_cast<int>((512L << 10) / (static_cast<long>(sizeof(T)) * depth)) / 64 * 64;
  return smaller(gradient_rows<T>(), larger(64, fit));
}
constexpr int kGradientChunk = 512;
// Panels of a weight that meets tokens whose tiles are held at once, so that each row of dy comes from L3 once for all
// of them: 64 x 512 in f32 are 128 KB.
constexpr int kGradientStrip = 16;

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
  int most, strip; // outputs of a block, panels whose tiles are held at once
  T* rows;         // dy^T of a block, [most, stride]
  float* tiles;    // [strip, most, 32]
  float* sums;     // of one chunk, [kRows, 32]
  long stride;

  // depth: TokenChunks::depth of a full store.  inputs: most of a weight that meets tokens (mlp_t); 0: there is none.
  WeightGradientScratch(Arena& arena, long depth, int inputs)
      : most(gradient_rows<T>(depth)), strip(larger(1, smaller(kGradientStrip, ceil_div(inputs, kPanel)))),
        rows(arena.take<T>(most * row_stride(static_cast<int>(depth)))),
        tiles(arena.take<float>(static_cast<long>(strip) * most * kPanel)),
        sums(arena.take<float>(Dot<T>::kRows * kPanel)), stride(row_stride(static_cast<int>(depth))) {}
  float* tiles_of(int panel) const { return tiles + static_cast<long>(panel) * most * kPanel; }
};

// Outputs of a block, so that threads have equally many blocks and whole tiles where those have a fixed height.
template <class T> int rows_of_block(const Team& team, int outputs, int most) {
  const int blocks = team.size * ceil_div(outputs, team.size * most), rows = ceil_div(outputs, blocks);
  return Dot<T>::kWholeRows > 1 ? round_up(rows, 64) : rows;
}

// A gradient [outputs, inputs] in f32; `fresh`: nothing has been written yet, so the first sum is stored, not added.
struct Gradient {
  float* values;
  bool fresh;
};

// The rows of a weight, or -1, for the outputs of a block.
template <class T> struct BlockRows {
  int count;
  int of[gradient_rows<T>()];

  template <class RowOf> BlockRows(int first, int count, RowOf row_of) : count(count) {
    for (int r = 0; r < count; ++r) of[r] = row_of(first + r);
  }
  // Whether outputs r to r + n - 1 are n consecutive rows.
  bool consecutive(int r, int n) const {
    if (r + n > count || of[r] < 0) return false;
    for (int i = 1; i < n; ++i)
      if (of[r + i] != of[r] + i) return false;
    return true;
  }
};

// fn(to, tile, lanes) for the vectors of grad[rows.of[r], c ..] and tiles[r], r from `begin` to `end`.
template <class T, class Fn>
TRMFAST_INLINE void for_gradient(const BlockRows<T>& rows, int begin, int end, int c, int columns, float* tiles,
                                 const Gradient& grad, Fn&& fn) {
  const int wide = smaller(kPanel, columns - c);
  for (int r = begin; r < end; ++r) {
    if (rows.of[r] < 0) continue; // padding
    float* to = grad.values + static_cast<long>(rows.of[r]) * columns + c;
    for (int j = 0; j < wide; j += kLanes) fn(to + j, tiles + r * kPanel + j, smaller(kLanes, wide - j));
  }
}
template <class T>
void load_gradient(const BlockRows<T>& rows, int begin, int end, int c, int columns, float* tiles,
                   const Gradient& grad) {
  if (grad.fresh) return;
  for_gradient(rows, begin, end, c, columns, tiles, grad,
               [](const float* from, float* tile, int lanes) { store(tile, load_lanes(from, lanes)); });
}
// Brings into the caches what load_gradient() and store_gradient() will touch.
template <class T>
void fetch_gradient(const BlockRows<T>& rows, int begin, int end, int c, int columns, const Gradient& grad) {
  if (c >= columns) return;
  for (int r = begin; r < end; ++r)
    for (int j = 0; j < kPanel; j += 16)
      if (rows.of[r] >= 0) __builtin_prefetch(grad.values + static_cast<long>(rows.of[r]) * columns + c + j, 1);
}
template <class T>
void store_gradient(const BlockRows<T>& rows, int begin, int end, int c, int columns, float* tiles,
                    const Gradient& grad) {
  for_gradient(rows, begin, end, c, columns, tiles, grad,
               [](float* to, const float* tile, int lanes) { store_lanes(to, load(tile), lanes); });
}

// tile <- or += a chunk, a [rows, depth] times a panel.  Every chunk is summed separately first: one chain over all
// tokens would round far more often than autograd's sum over the updates does.
TRMFAST_INLINE void add_product(const bf16* a, long lda, const bf16* panel, int depth, int rows, bool fresh, float*,
                                float* tile, Prefetch next) {
  Dot<bf16>::run(a, lda, panel, depth, rows, tile, kPanel, !fresh, next);
}
TRMFAST_INLINE void add_product(const float* a, long lda, const float* panel, int depth, int rows, bool fresh,
                                float* sums, float* tile, Prefetch next) {
  multiply(a, lda, panel, depth, rows, fresh ? tile : sums, kPanel, next);
  if (!fresh) add_sums(rows, sums, tile);
}

// A part of memory to fetch, of `count` equal ones.
template <class T> Prefetch part_of(const T* from, long elements, int part, int count) {
  const long share = elements / count;
  return {from + part * share, share * static_cast<long>(sizeof(T))};
}

// tiles[0 .. n) <- or += a chunk.  next(i, count): what to fetch during the product of tile i of `count`.
template <class T, class Next>
void add_chunk(int n, const T* left, long left_stride, const T* panel, int depth, bool fresh, float* sums, float* tiles,
               Next&& next) {
  const RowTiles<Dot<T>> rows(n);
  for (int i = 0; i < rows.count; ++i)
    add_product(left + rows.begin(i) * left_stride, left_stride, panel, depth, rows.size(i), fresh, sums,
                tiles + rows.begin(i) * kPanel, next(i, rows.count));
}

// add_chunks() on AMX, which sums 32 depths before it adds them, so that a chain over all tokens has a 32nd of the
// additions: it needs no sums of chunks.  Its tiles load and store the gradient in its place where 16 outputs are 16
// consecutive rows.  The lines of the next panel's columns,
// which would come from L3 one row at a time, are fetched meanwhile.
template <class T, class Left, class Right, class Depth>
void add_chunks_in_place(const BlockRows<T>& rows, int c, int columns, const Gradient& grad, int chunks,
                         long left_stride, const WeightGradientScratch<T>& scratch, Left left, Right right,
                         Depth depth) {
  constexpr int kHalfRows = Dot<T>::kWholeRows, kTile = 2 * kHalfRows;
  const int count = ceil_div(rows.count, kTile);
  for (int chunk = 0; chunk < chunks; ++chunk)
    for (int i = 0; i < count; ++i) {
      const int r = i * kTile, n = smaller(kTile, rows.count - r);
      const bool in_place =
          c + kPanel <= columns && rows.consecutive(r, kHalfRows) && rows.consecutive(r + kHalfRows, kHalfRows);
      const T *from = left(chunk) + r * left_stride, *panel = right(chunk);
      const long elements = static_cast<long>(depth(chunk)) * kPanel, share = elements / count;
      const Prefetch next{panel + elements + i * share, share * static_cast<long>(sizeof(T))};
      const bool accumulate = !grad.fresh || chunk > 0;
      if (!in_place) {
        if (chunk == 0) load_gradient(rows, r, r + n, c, columns, scratch.tiles, grad);
        Dot<T>::run(from, left_stride, panel, depth(chunk), n, scratch.tiles + r * kPanel, kPanel, accumulate, next);
        if (chunk + 1 == chunks) store_gradient(rows, r, r + n, c, columns, scratch.tiles, grad);
        continue;
      }
      float *upper = grad.values + static_cast<long>(rows.of[r]) * columns + c,
            *lower = grad.values + static_cast<long>(rows.of[r + kHalfRows]) * columns + c;
      const int each = chunk == 0 && c + 2 * kPanel <= columns ? ceil_div(kHalfRows, depth(0) / Dot<T>::kDepthStep) : 0;
      Dot<T>::run_halves(from, left_stride, panel, depth(chunk), upper, lower, columns, accumulate, next,
                         [&](int step) {
                           for (int k = step * each; k < smaller(kHalfRows, (step + 1) * each); ++k)
                             for (int j = kPanel; j < 2 * kPanel; j += 16) {
                               __builtin_prefetch(upper + static_cast<long>(k) * columns + j, 1);
                               __builtin_prefetch(lower + static_cast<long>(k) * columns + j, 1);
                             }
                         });
    }
}

// Adds the chunks to rows.of[..] and columns c.. of a gradient.
template <class T, class Left, class Right, class Depth>
void add_chunks(const BlockRows<T>& rows, int c, int columns, const Gradient& grad, int chunks, long left_stride,
                const WeightGradientScratch<T>& scratch, Left left, Right right, Depth depth) {
  if constexpr (Dot<T>::kWholeRows > 1) {
    add_chunks_in_place(rows, c, columns, grad, chunks, left_stride, scratch, left, right, depth);
  } else {
    load_gradient(rows, 0, rows.count, c, columns, scratch.tiles, grad);
    const int tiles = RowTiles<Dot<T>>(rows.count).count, each = ceil_div(rows.count, chunks * tiles);
    for (int chunk = 0; chunk < chunks; ++chunk)
      add_chunk(rows.count, left(chunk), left_stride, right(chunk), depth(chunk), grad.fresh && chunk == 0,
                scratch.sums, scratch.tiles, [&](int i, int count) {
                  const int r = (chunk * tiles + i) * each;
                  fetch_gradient(rows, r, smaller(rows.count, r + each), c + kPanel, columns, grad);
                  const long elements = static_cast<long>(depth(chunk)) * kPanel;
                  return part_of(right(chunk) + elements, elements, i, count);
                });
    store_gradient(rows, 0, rows.count, c, columns, scratch.tiles, grad);
  }
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
  const int most = rows_of_block<T>(team, outputs, scratch.most);
  const Range blocks = team.split(ceil_div(outputs, most));
  for (int block = blocks.begin; block < blocks.end && !team.stopped(); ++block) {
    const int first = block * most, n = smaller(most, outputs - first);
    const BlockRows<T> rows(first, n, row_of);
    for (int g = 0; g < chunks.groups; ++g)
      transpose(dy + static_cast<long>(g) * chunks.group * dy_stride + first, dy_stride, chunks.tokens_of(g), n,
                scratch.rows + static_cast<long>(g) * chunks.padded, scratch.stride);
    for (int p = 0; p < num_panels && !team.stopped(); ++p)
      add_chunks<T>(
          rows, p * kPanel, inputs, grad, chunks.count, scratch.stride, scratch,
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
  const int most = rows_of_block<T>(team, outputs, scratch.most);
  const Range blocks = team.split(ceil_div(outputs, most));
  for (int block = blocks.begin; block < blocks.end && !team.stopped(); ++block) {
    const int first = block * most;
    const BlockRows<T> rows(first, smaller(most, outputs - first), [](int row) { return row; });
    const auto left = [&](int sequence) { return dy + (static_cast<long>(sequence) * outputs + first) * stride; };
    const auto right = [&](int sequence, int p) {
      return panels + (static_cast<long>(sequence) * num_panels + p) * elements;
    };
    const int depth = padded_depth<T>(width);
    if constexpr (Dot<T>::kWholeRows > 1) {
      for (int p = 0; p < num_panels && !team.stopped(); ++p)
        add_chunks_in_place(
            rows, p * kPanel, inputs, grad, sequences, stride, scratch, left,
            [&](int sequence) { return right(sequence, p); }, [&](int) { return depth; });
      continue;
    }
    for (int strip = 0; strip < num_panels && !team.stopped(); strip += scratch.strip) {
      const int end = smaller(num_panels, strip + scratch.strip);
      for (int p = strip; p < end; ++p)
        load_gradient(rows, 0, rows.count, p * kPanel, inputs, scratch.tiles_of(p - strip), grad);
      for (int sequence = 0; sequence < sequences && !team.stopped(); ++sequence)
        for (int p = strip; p < end; ++p)
          add_chunk(rows.count, left(sequence), stride, right(sequence, p), depth, grad.fresh && sequence == 0,
                    scratch.sums, scratch.tiles_of(p - strip), [&](int i, int count) {
                      if (i % 2 == 0) return part_of(right(sequence, p) + elements, elements, i / 2, (count + 1) / 2);
                      return part_of(left(sequence + 1), rows.count * stride, (p - strip) * (count / 2) + i / 2,
                                     (end - strip) * (count / 2));
                    });
      for (int p = strip; p < end; ++p)
        store_gradient(rows, 0, rows.count, p * kPanel, inputs, scratch.tiles_of(p - strip), grad);
    }
  }
  team.sync();
}

} // namespace TRMFAST_NAMESPACE
} // namespace trmfast
