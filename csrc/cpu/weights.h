// Packed weights of one block, packed once per weight version.
//
// Forward packs hold W^T (depth: input channels), backward packs hold W (depth: output channels), all in the column
// orders of layout.h.  The mlp_t mixer multiplies from the left, so its weights are rows with a padded leading
// dimension instead.  A learned norm that stands before a product is folded into it: W diag(norm weight).
#pragma once

#include "arena.h"
#include "pack.h"

namespace trmfast {
namespace TRMFAST_NAMESPACE {

// The small weights, in f32 and padded with zeros; null where the block has none.
struct BlockVectors {
  float* result_norm[2] = {};                 // [width], of the two halves
  float *q_norm = nullptr, *k_norm = nullptr; // [qk_width], packed columns
  float* qk_bias = nullptr;                   // [(heads + kv_heads) qk_width], packed columns
  float* decay_bias = nullptr;                // [heads]

  BlockVectors(Arena& arena, const BlockShape& block) {
    const WeightPlaces places(block);
    const HeadLayout heads(block);
    for (int half = 0; half < 2; ++half)
      if (places.result_norm[half] >= 0) result_norm[half] = arena.take<float>(round_up(block.width, kPanel));
    if (places.q_norm >= 0) {
      q_norm = arena.take<float>(heads.qk_width);
      k_norm = arena.take<float>(heads.qk_width);
    }
    if (places.qk_bias >= 0) qk_bias = arena.take<float>(heads.value(0));
    if (places.decay_bias >= 0) decay_bias = arena.take<float>(heads.decays);
  }
};

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
  BlockVectors vectors;
  ConvWeights<T> conv;

  ForwardWeights(Arena& arena, const BlockShape& block) : vectors(arena, block), conv(arena, block) {
    const HeadLayout heads(block);
    const GateLayout gates(block);
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
  BlockVectors vectors;
  ConvWeights<T> conv;

  BackwardWeights(Arena& arena, const BlockShape& block) : vectors(arena, block), conv(arena, block) {
    const HeadLayout heads(block);
    const GateLayout gates(block);
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

// The weight of a net's final norm, [width] in f32 padded with zeros, which follows the blocks in both packs; null if
// there is none.
inline float* take_final_norm(Arena& arena, const NetShape& net) {
  return net.final_norm && net.block.norm_weight ? arena.take<float>(round_up(net.block.width, kPanel)) : nullptr;
}

// Weights: ForwardWeights<T> or BackwardWeights<T>.
template <class Weights> Weights layer_weights(const NetShape& net, const void* packed, int layer) {
  Arena arena(const_cast<void*>(packed));
  for (int before = 0; before < layer; ++before) Weights(arena, net.block);
  return Weights(arena, net.block);
}
template <class Weights> const float* final_norm_weight(const NetShape& net, const void* packed) {
  Arena arena(const_cast<void*>(packed));
  for (int before = 0; before < net.layers; ++before) Weights(arena, net.block);
  return take_final_norm(arena, net);
}

// The slices of a pack that one thread packs: panels are dealt round-robin to the threads.
class PackTurn {
public:
  PackTurn(int thread, int threads) : thread_(thread), threads_(threads) {}
  bool mine() { return turn_++ % threads_ == thread_; }

private:
  int thread_, threads_, turn_ = 0;
};

// Panels of W^T: panel column n is row row_of(n) of w [rows, depth], times `norm` [depth] if that is not null.
template <class T, class RowOf>
void pack_weight_transposed(const float* w, const float* norm, int columns, int depth, T* panels, PackTurn& turn,
                            RowOf row_of) {
  for (int first = 0; first < columns; first += kPanel, panels += panel_elements<T>(depth)) {
    if (!turn.mine()) continue;
    const auto row = [&](int j) -> const float* {
      const int n = first + j < columns ? row_of(first + j) : -1;
      return n < 0 ? nullptr : w + static_cast<long>(n) * depth;
    };
    if (norm)
      pack_transposed_panel<T>([&](int j) { return ScaledRow{row(j), norm}; }, depth, panels);
    else
      pack_transposed_panel<T>(row, depth, panels);
  }
}

// Panels of W: depth k is row row_of(k) of w [.., columns], times `norm` [columns] if that is not null.
template <class T, class RowOf>
void pack_weight_rows(const float* w, const float* norm, int depth, int columns, T* panels, PackTurn& turn,
                      RowOf row_of) {
  for (int first = 0; first < columns; first += kPanel, panels += panel_elements<T>(depth)) {
    if (!turn.mine()) continue;
    const auto row = [&](int k) -> const float* {
      const int n = row_of(k);
      return n < 0 ? nullptr : w + static_cast<long>(n) * columns + first;
    };
    if (norm)
      pack_panel<T>([&](int k) { return ScaledRow{row(k), norm + first}; }, depth, columns - first, panels);
    else
      pack_panel<T>(row, depth, columns - first, panels);
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

// weights: the f32 tensors of a block in the order of trmfast/spec.py, here and below.
template <class T>
void pack_conv(const BlockShape& block, const float* const* weights, const ConvWeights<T>& to, PackTurn& turn) {
  const int taps = block.conv_taps;
  if (!taps || !turn.mine()) return;
  const int place = WeightPlaces(block).conv;
  const float *kernel = weights[place], *kernel_bias = weights[place + 1];
  const auto put = [&](T* at, const float* values, int c, int step) {
    float padded[kLanes];
    for (int i = 0; i < kLanes; ++i) padded[i] = c + i < block.inner ? values[static_cast<long>(c + i) * step] : 0.0f;
    store(at + c, load(padded));
  };
  for (int c = 0; c < to.columns; c += kLanes) {
    for (int k = 0; k < taps; ++k) put(to.kernel + k * to.columns, kernel + k, c, taps);
    put(to.bias, kernel_bias, c, 1);
  }
}

// to[c] <- from[place(c)], zero where that is -1.
template <class Place> void pack_vector(const float* from, int columns, float* to, Place place) {
  for (int c = 0; c < columns; ++c) to[c] = place(c) < 0 ? 0.0f : from[place(c)];
}

inline void pack_channels(const float* from, int width, float* to) {
  pack_vector(from, round_up(width, kPanel), to, [&](int c) { return c < width ? c : -1; });
}

inline void pack_vectors(const BlockShape& block, const float* const* weights, const BlockVectors& to, PackTurn& turn) {
  const WeightPlaces places(block);
  if (!turn.mine()) return;
  const HeadLayout heads(block);
  for (int half = 0; half < 2; ++half)
    if (to.result_norm[half]) pack_channels(weights[places.result_norm[half]], block.width, to.result_norm[half]);
  const auto channel = [&](int c) { return heads.qk_channel(c); };
  if (to.q_norm) {
    pack_vector(weights[places.q_norm], heads.qk_width, to.q_norm, channel);
    pack_vector(weights[places.k_norm], heads.qk_width, to.k_norm, channel);
  }
  if (to.qk_bias)
    pack_vector(weights[places.qk_bias], heads.value(0), to.qk_bias, [&](int c) { return heads.qk_index(c); });
  if (to.decay_bias) pack_vector(weights[places.decay_bias], heads.decays, to.decay_bias, [](int c) { return c; });
}

// What a norm before the first product of a half multiplies its weight by, or null.
inline const float* input_norm_weight(const BlockShape& block, const float* const* weights, int half) {
  const int place = WeightPlaces(block).input_norm[half];
  return place < 0 ? nullptr : weights[place];
}

template <class T>
void pack_forward(const BlockShape& block, const float* const* weights, const ForwardWeights<T>& to, PackTurn& turn) {
  const WeightPlaces places(block);
  const HeadLayout heads(block);
  const GateLayout gates(block);
  const int D = block.width;
  const auto same = [](int n) { return n; };
  const float *in = weights[places.mixer_in], *out = weights[places.mixer_out];
  if (block.attention) {
    pack_weight_transposed(in, input_norm_weight(block, weights, 0), heads.columns(), D, to.qkv, turn,
                           [&](int n) { return heads.qkv_row(n); });
    pack_weight_transposed(out, nullptr, D, heads.output_columns(), to.output, turn, same);
  } else {
    const int L = block.seq_len, inner = block.seq_inner;
    pack_left(2 * inner, L, to.seq_gate_up, row_stride(L), turn,
              [=](int r, int c) { return in[static_cast<long>(r) * L + c]; });
    pack_left(L, inner, to.seq_down, row_stride(inner), turn,
              [=](int r, int c) { return out[static_cast<long>(r) * inner + c]; });
  }
  pack_weight_transposed(weights[places.up], input_norm_weight(block, weights, 1), gates.columns(), D, to.gate_up, turn,
                         [&](int n) { return gates.row(n); });
  pack_conv(block, weights, to.conv, turn);
  pack_weight_transposed(weights[places.down], nullptr, D, block.inner, to.down, turn, same);
  pack_vectors(block, weights, to.vectors, turn);
}

template <class T>
void pack_backward(const BlockShape& block, const float* const* weights, const BackwardWeights<T>& to, PackTurn& turn) {
  const WeightPlaces places(block);
  const HeadLayout heads(block);
  const GateLayout gates(block);
  const int D = block.width;
  const auto same = [](int n) { return n; };
  const float *in = weights[places.mixer_in], *out = weights[places.mixer_out];
  if (block.attention) {
    pack_weight_rows(in, input_norm_weight(block, weights, 0), heads.columns(), D, to.qkv, turn,
                     [&](int n) { return heads.qkv_row(n); });
    pack_weight_rows(out, nullptr, D, heads.output_columns(), to.output, turn, same);
  } else {
    const int L = block.seq_len, inner = block.seq_inner, padded = padded_depth<T>(inner);
    // Gate columns, padding, up columns, padding: the order of the gradient's panels.
    pack_left(L, 2 * padded, to.seq_gate_up, row_stride(2 * padded), turn, [=](int r, int c) {
      const int i = c % padded;
      return i < inner ? in[static_cast<long>(c < padded ? i : inner + i) * L + r] : 0.0f;
    });
    pack_left(inner, L, to.seq_down, row_stride(L), turn,
              [=](int r, int c) { return out[static_cast<long>(c) * inner + r]; });
  }
  pack_weight_rows(weights[places.up], input_norm_weight(block, weights, 1), gates.columns(), D, to.gate_up, turn,
                   [&](int n) { return gates.row(n); });
  pack_conv(block, weights, to.conv, turn);
  pack_weight_rows(weights[places.down], nullptr, D, block.inner, to.down, turn, same);
  pack_vectors(block, weights, to.vectors, turn);
}

} // namespace TRMFAST_NAMESPACE
} // namespace trmfast
