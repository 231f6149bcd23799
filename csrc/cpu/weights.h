// Packed weights of one block, packed once per weight version.
//
// Forward packs hold W^T (depth: input channels), backward packs hold W (depth: output channels), all in the column
// orders of layout.h.  The mlp_t mixer multiplies from the left, so its weights are rows with a padded leading
// dimension instead.
#pragma once

#include "arena.h"
#include "pack.h"

namespace trmfast {
namespace TRMFAST_NAMESPACE {

// The depthwise convolution, by tap; the columns are padded with zeros.
template <class T> struct ConvWeights {
  T *kernel = nullptr, *bias = nullptr; // [taps, columns], [columns]
  int columns = 0;

  ConvWeights(Arena& arena, const BlockShape& block) {
    if (!block.conv_taps) return;
    columns = round_up(block.inner, kPanel);
    kernel = arena.take<T>(static_cast<long>(block.conv_taps) * columns);
    bias = arena.take<T>(columns);
  }
};

template <class T> struct ForwardWeights {
  T *qkv = nullptr, *output = nullptr;           // attention
  T *seq_gate_up = nullptr, *seq_down = nullptr; // mlp_t: rows [2 seq_inner, L] and [L, seq_inner]
  T *gate_up = nullptr, *down = nullptr;
  ConvWeights<T> conv;

  ForwardWeights(Arena& arena, const BlockShape& block) : conv(arena, block) {
    const HeadLayout heads(block);
    const GateLayout gates{block.inner};
    if (block.attention) {
      qkv = arena.take<T>(packed_elements<T>(block.width, heads.columns()));
      output = arena.take<T>(packed_elements<T>(heads.output_columns(), block.width));
    } else {
      seq_gate_up = arena.take<T>(2L * block.seq_inner * row_stride(block.seq_len));
      seq_down = arena.take<T>(block.seq_len * row_stride(block.seq_inner));
    }
    gate_up = arena.take<T>(packed_elements<T>(block.width, gates.columns()));
    down = arena.take<T>(packed_elements<T>(gates.activation_columns(), block.width));
  }
};

template <class T> struct BackwardWeights {
  T *qkv = nullptr, *output = nullptr;
  T *seq_gate_up = nullptr, *seq_down = nullptr; // transposed rows [L, 2 padded seq_inner] and [seq_inner, L]
  T *gate_up = nullptr, *down = nullptr;
  ConvWeights<T> conv;

  BackwardWeights(Arena& arena, const BlockShape& block) : conv(arena, block) {
    const HeadLayout heads(block);
    const GateLayout gates{block.inner};
    if (block.attention) {
      qkv = arena.take<T>(packed_elements<T>(heads.columns(), block.width));
      output = arena.take<T>(packed_elements<T>(block.width, heads.output_columns()));
    } else {
      seq_gate_up = arena.take<T>(block.seq_len * row_stride(2 * padded_depth<T>(block.seq_inner)));
      seq_down = arena.take<T>(block.seq_inner * row_stride(block.seq_len));
    }
    gate_up = arena.take<T>(packed_elements<T>(gates.columns(), block.width));
    down = arena.take<T>(packed_elements<T>(block.width, gates.activation_columns()));
  }
};

// The slices of a pack that one thread packs: panels are dealt round-robin to the threads.
class PackTurn {
public:
  PackTurn(int thread, int threads) : thread_(thread), threads_(threads) {}
  bool mine() { return turn_++ % threads_ == thread_; }

private:
  int thread_, threads_, turn_ = 0;
};

// Panels of W^T: panel column n is row row_of(n) of w [rows, depth].  column_of(k): the column of w that stands at
// depth k.
template <class T, class RowOf>
void pack_weight_transposed(const float* w, long stride, int columns, int depth, T* panels, PackTurn& turn,
                            RowOf row_of) {
  for (int first = 0; first < columns; first += kPanel, panels += panel_elements<T>(depth)) {
    if (!turn.mine()) continue;
    pack_transposed_panel<T, float>(
        [&](int j) {
          const int row = first + j < columns ? row_of(first + j) : -1;
          return row < 0 ? nullptr : w + row * stride;
        },
        depth, panels);
  }
}

// Panels of W: depth k is row row_of(k) of w, panel columns are its columns.
template <class T, class RowOf>
void pack_weight_rows(const float* w, long stride, int depth, int columns, T* panels, PackTurn& turn, RowOf row_of) {
  for (int first = 0; first < columns; first += kPanel, panels += panel_elements<T>(depth)) {
    if (!turn.mine()) continue;
    pack_panel<T>(
        [&](int k) {
          const int row = row_of(k);
          return row < 0 ? nullptr : w + row * stride + first;
        },
        depth, columns - first, panels);
  }
}

// Rows of w (or of its transpose) as T with a padded leading dimension, zero beyond `columns`.
template <class T, class At>
void pack_left(int rows, int columns, T* to, long to_stride, PackTurn& turn, At at) {
  for (int r = 0; r < rows; ++r) {
    if (!turn.mine()) continue;
    for (long c = 0; c < to_stride; c += kLanes) {
      float values[kLanes];
      for (int i = 0; i < kLanes; ++i) values[i] = c + i < columns ? at(r, static_cast<int>(c) + i) : 0.0f;
      store(to + r * to_stride + c, load(values));
    }
  }
}

// weights: f32, [inner, 1, taps] and [inner].
template <class T>
void pack_conv(const BlockShape& block, const float* const* weights, const ConvWeights<T>& to, PackTurn& turn) {
  const int taps = block.conv_taps;
  if (!taps || !turn.mine()) return;
  const auto put = [&](T* at, const float* values, int c, int step) {
    float padded[kLanes];
    for (int i = 0; i < kLanes; ++i) padded[i] = c + i < block.inner ? values[static_cast<long>(c + i) * step] : 0.0f;
    store(at + c, load(padded));
  };
  for (int c = 0; c < to.columns; c += kLanes) {
    for (int k = 0; k < taps; ++k) put(to.kernel + k * to.columns, weights[0] + k, c, taps);
    put(to.bias, weights[1], c, 1);
  }
}

// weights: the f32 tensors of a block in the order of trmfast/spec.py.
template <class T>
void pack_forward(const BlockShape& block, const float* const* weights, const ForwardWeights<T>& to, PackTurn& turn) {
  const HeadLayout heads(block);
  const GateLayout gates{block.inner};
  const int D = block.width;
  const auto same = [](int n) { return n; };
  if (block.attention) {
    pack_weight_transposed(weights[0], D, heads.columns(), D, to.qkv, turn, [&](int n) { return heads.qkv_row(n); });
    pack_weight_transposed(weights[1], heads.output_columns(), D, heads.output_columns(), to.output, turn, same);
  } else {
    const int L = block.seq_len, inner = block.seq_inner;
    const float *gate_up = weights[0], *down = weights[1];
    pack_left(2 * inner, L, to.seq_gate_up, row_stride(L), turn,
              [=](int r, int c) { return gate_up[static_cast<long>(r) * L + c]; });
    pack_left(L, inner, to.seq_down, row_stride(inner), turn,
              [=](int r, int c) { return down[static_cast<long>(r) * inner + c]; });
  }
  pack_weight_transposed(weights[2], D, gates.columns(), D, to.gate_up, turn, [&](int n) { return gates.row(n); });
  pack_conv(block, weights + 3, to.conv, turn);
  pack_weight_transposed(weights[block_weights(block) - 1], block.inner, D, block.inner, to.down, turn, same);
}

template <class T>
void pack_backward(const BlockShape& block, const float* const* weights, const BackwardWeights<T>& to, PackTurn& turn) {
  const HeadLayout heads(block);
  const GateLayout gates{block.inner};
  const int D = block.width;
  const auto same = [](int n) { return n; };
  if (block.attention) {
    pack_weight_rows(weights[0], D, heads.columns(), D, to.qkv, turn, [&](int n) { return heads.qkv_row(n); });
    pack_weight_rows(weights[1], heads.output_columns(), D, heads.output_columns(), to.output, turn, same);
  } else {
    const int L = block.seq_len, inner = block.seq_inner, padded = padded_depth<T>(inner);
    const float *gate_up = weights[0], *down = weights[1];
    // Gate columns, padding, up columns, padding: the order of the gradient's panels.
    pack_left(L, 2 * padded, to.seq_gate_up, row_stride(2 * padded), turn, [=](int r, int c) {
      const int i = c % padded;
      return i < inner ? gate_up[static_cast<long>(c < padded ? i : inner + i) * L + r] : 0.0f;
    });
    pack_left(inner, L, to.seq_down, row_stride(L), turn,
              [=](int r, int c) { return down[static_cast<long>(c) * inner + r]; });
  }
  pack_weight_rows(weights[2], D, gates.columns(), D, to.gate_up, turn, [&](int n) { return gates.row(n); });
  pack_conv(block, weights + 3, to.conv, turn);
  pack_weight_rows(weights[block_weights(block) - 1], block.inner, D, block.inner, to.down, turn, same);
}

} // namespace TRMFAST_NAMESPACE
} // namespace trmfast
