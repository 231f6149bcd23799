// The mlp_t token mixer: t = h^T, t <- norm(t + W_down (silu(W_gate t) * W_up t)), the norm over the L positions of a
// channel.
//
// Nothing is transposed: the weights multiply from the left, [inner, L] x [L, 32 channels], with the weights as the
// streamed rows and 32 channels of h as the packed panel.  A panel never needs another one, the norm included, so
// (sequence, panel) is the unit of work: h panel -> activation panel [inner, 32] in L1 -> u [L, 32] -> norm.
#pragma once

#include "arena.h"
#include "gemm.h"
#include "rope.h"
#include "swiglu.h"

namespace trmfast {
namespace TRMFAST_NAMESPACE {

// Kept for backward; all null otherwise.  Rows are the inner features, columns the channels of a sequence:
// [sequences, seq_inner or 2 seq_inner, stride of h].
template <class T> struct MlpTActivations {
  T* gate_up = nullptr; // gate rows, then up rows
  T* activation = nullptr;
  float* rstd = nullptr; // of the norm: one per channel, [sequences, stride of u]
};

template <class T> struct MlpTScratch {
  T* input;         // panel of h, depth L
  T* activation;    // panel of silu(gate) * up, depth seq_inner
  float* u;         // [L, 32]
  float *gate, *up; // tiles

  MlpTScratch(Arena& arena, const BlockShape& block)
      : input(arena.take<T>(panel_elements<T>(block.seq_len))),
        activation(arena.take<T>(panel_elements<T>(block.seq_inner))),
        u(arena.take<float>(static_cast<long>(block.seq_len) * kPanel)),
        gate(arena.take<float>((Dot<T>::kRows + 1) * kPanel)), up(arena.take<float>((Dot<T>::kRows + 1) * kPanel)) {}
};

// Row tiles of an even number of rows but the last, so that bf16 pairs of depth never straddle two tiles.
struct EvenRowTiles {
  int rows, step, count;
  EvenRowTiles(int rows, int most)
      : rows(rows), step(round_up(ceil_div(rows, ceil_div(rows, most / 2 * 2)), 2)), count(ceil_div(rows, step)) {}
  int begin(int tile) const { return tile * step; }
  int size(int tile) const { return smaller(step, rows - tile * step); }
};

// Depth rows first.. of a panel from n tile rows; an odd last row is paired with zeros, and the rest of the padded
// depth after the last tile is zeroed.
template <class T> void store_depth_rows(const float* tile, int first, int n, int depth, T* panel) {
  static const float zeros[kPanel] = {};
  for (int r = 0; r < n; r += 2)
    if (sizeof(T) == 2 || r + 1 < n)
      store_row_pair(panel + static_cast<long>(first + r) * kPanel, tile + r * kPanel,
                     r + 1 < n ? tile + (r + 1) * kPanel : zeros);
    else
      __builtin_memcpy(panel + static_cast<long>(first + r) * kPanel, tile + r * kPanel, sizeof zeros);
  if (first + n < depth) return;
  const int written = sizeof(T) == 2 ? round_up(depth, 2) : depth;
  for (long i = static_cast<long>(written) * kPanel; i < panel_elements<T>(depth); ++i) panel[i] = T{};
}

// The sum of term(t) over the positions of a sequence, 32 at a time: one chain of 916 additions would round more than
// PyTorch's sum does.
template <class Term> TRMFAST_INLINE vf sum_over_positions(int length, Term&& term) {
  vf total = {};
  for (int t = 0; t < length; t += 32) {
    vf part = {};
    for (int i = t; i < smaller(length, t + 32); ++i) part += term(i);
    total += part;
  }
  return total;
}

// y <- norm of u [L, 32] over the positions of each of `columns` channels; r, if not null: [columns].
template <class T>
void norm_over_positions(const BlockShape& block, const float* u, int columns, T* y, long stride, float* r) {
  const int L = block.seq_len;
  for (int j = 0; j < columns; j += kLanes) {
    const vf squares = sum_over_positions(L, [&](int t) {
      const vf value = load(u + t * kPanel + j);
      return value * value;
    });
    const vf scale = rsqrt(squares / static_cast<float>(L) + block.eps);
    for (int t = 0; t < L; ++t)
      store_lanes(y + t * stride + j, load(u + t * kPanel + j) * scale, smaller(kLanes, columns - j));
    if (r) store(r + j, scale);
  }
}

template <class T>
void mlp_t_forward(const Team& team, const BlockShape& block, const T* gate_up, const T* down, int sequences,
                   const T* h, long stride, T* h1, const MlpTActivations<T>& keep, const MlpTScratch<T>& scratch) {
  const int L = block.seq_len, inner = block.seq_inner, panels = ceil_div(block.width, kPanel);
  const long in_stride = row_stride(L), inner_stride = row_stride(inner);
  const EvenRowTiles features(inner, Dot<T>::kRows);
  const RowTiles<Dot<T>> positions(L);
  const Range items = team.split(sequences * panels);
  for (int item = items.begin; item < items.end; ++item) {
    const int sequence = item / panels, c = item % panels * kPanel, columns = smaller(kPanel, block.width - c);
    const T* x = h + static_cast<long>(sequence) * L * stride + c;
    T* y = h1 + static_cast<long>(sequence) * L * stride + c;
    pack_rows(x, stride, L, columns, scratch.input);

    for (int i = 0; i < features.count; ++i) {
      if (team.stopped()) return;
      const int row = features.begin(i), n = features.size(i);
      multiply(gate_up + row * in_stride, in_stride, scratch.input, padded_depth<T>(L), n, scratch.gate, kPanel);
      multiply(gate_up + (inner + row) * in_stride, in_stride, scratch.input, padded_depth<T>(L), n, scratch.up,
               kPanel);
      if (keep.gate_up) {
        T* kept = keep.gate_up + (static_cast<long>(sequence) * 2 * inner + row) * stride + c;
        for_rows(0, n, scratch.gate, [&](int r, const float* in) { store_group(in, kept + r * stride); });
        for_rows(inner, n, scratch.up, [&](int r, const float* in) { store_group(in, kept + r * stride); });
      }
      for (int j = 0; j < n * kPanel; j += kLanes)
        store(scratch.gate + j, swiglu<T>(load(scratch.gate + j), load(scratch.up + j)));
      if (keep.activation) {
        T* kept = keep.activation + (static_cast<long>(sequence) * inner + row) * stride + c;
        for_rows(0, n, scratch.gate, [&](int r, const float* in) { store_group(in, kept + r * stride); });
      }
      store_depth_rows(scratch.gate, row, n, inner, scratch.activation);
    }

    for (int i = 0; i < positions.count; ++i) {
      const int row = positions.begin(i), n = positions.size(i), lead = positions.lead(i);
      multiply(down + (row - lead) * inner_stride, inner_stride, scratch.activation, padded_depth<T>(inner), lead + n,
               scratch.gate, kPanel);
      for_rows(row, n, scratch.gate + lead * kPanel, [&](int t, const float* in) {
        for (int j = 0; j < kPanel; j += kLanes) {
          const vf u = load(x + t * stride + j) + load(in + j);
          store(scratch.u + t * kPanel + j, u);
        }
      });
    }
    norm_over_positions(block, scratch.u, columns, y, stride,
                        keep.rstd ? keep.rstd + static_cast<long>(sequence) * round_up(block.width, kPanel) + c
                                  : nullptr);
  }
}

} // namespace TRMFAST_NAMESPACE
} // namespace trmfast
