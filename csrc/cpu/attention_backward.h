// Gradients of attention.  Query rows go in blocks of about 128: probabilities P and score gradients dS are
// recomputed from q and k, dQ = dS K is written at once, and P^T dO and dS^T Q accumulate in f32 for one head, [L,
// 64] each. Memory is (rows of a block) x L, never L x L.
#pragma once

#include "attention.h"

namespace trmfast {
namespace TRMFAST_NAMESPACE {

template <class T> constexpr int attention_block_tiles() { return ceil_div(128, Dot<T>::kRows); }
template <class T> constexpr int attention_block_rows() { return attention_block_tiles<T>() * Dot<T>::kRows; }

template <class T> struct AttentionBackwardScratch {
  AttentionScratch<T> forward; // its keys; values are unused
  T* values_transposed;        // V^T panels, depth v_width, columns L
  T* keys_rows;                // K panels, depth L, columns qk_width
  T* query_rows;               // Q panels of a block of rows, columns qk_width
  T* grad_rows;                // dO panels of a block of rows, columns v_width
  float* grad_weights;         // dP of a tile [kRows, score_stride]
  T* weights;                  // P of a block [block rows, weight_stride]
  T* grad_scores;              // dS of a block
  T* transposed;               // P^T or dS^T, [L + padding, block_stride]
  float* grad_query;           // of a tile [kRows, qk_width]
  float* grad_key;             // [L + padding, qk_width]
  float* grad_value;           // [L + padding, v_width]
  float* sums;                 // of 32 rows, for the gradients of bias and norm, [2, qk_width]
  double* grad_total;          // of the sums of a head's decays, [L, to whole panels]
  long block_stride;

  AttentionBackwardScratch(Arena& arena, const BlockShape& block, int length)
      : AttentionBackwardScratch(arena, block, HeadLayout(block), block.attention ? length : 0) {}

private:
  // Room for a last tile of keys that is multiplied as a whole piece; nobody reads what it holds beyond the keys.
  static long padded_rows(int length) { return length + Dot<T>::kWholeRows - 1; }

  AttentionBackwardScratch(Arena& arena, const BlockShape& block, const HeadLayout& heads, int length)
      : forward(arena, block, length), values_transposed(arena.take<T>(packed_elements<T>(heads.v_width, length))),
        keys_rows(arena.take<T>(packed_elements<T>(length, heads.qk_width))),
        query_rows(arena.take<T>(packed_elements<T>(attention_block_rows<T>(), heads.qk_width))),
        grad_rows(arena.take<T>(packed_elements<T>(attention_block_rows<T>(), heads.v_width))),
        grad_weights(arena.take<float>(static_cast<long>(Dot<T>::kRows) * forward.score_stride)),
        weights(arena.take<T>(static_cast<long>(attention_block_rows<T>()) * forward.weight_stride)),
        grad_scores(arena.take<T>(static_cast<long>(attention_block_rows<T>()) * forward.weight_stride)),
        transposed(arena.take<T>(padded_rows(length) * row_stride(attention_block_rows<T>()))),
        grad_query(arena.take<float>(static_cast<long>(Dot<T>::kRows) * heads.qk_width)),
        grad_key(arena.take<float>(padded_rows(length) * heads.qk_width)),
        grad_value(arena.take<float>(padded_rows(length) * heads.v_width)),
        sums(arena.take<float>(2L * heads.qk_width)),
        grad_total(arena.take<double>(block.decay ? round_up(length, kPanel) : 0)),
        block_stride(row_stride(attention_block_rows<T>())) {}
};

// What attention writes beside the gradient of its output's gate.
template <class T> struct AttentionGradients {
  T* qkv;             // of the product's columns; may be the place of its results
  const float* scale; // [L], of the rows of all of qkv, where a norm stands before the product; or null
  float* qk_bias;     // [(heads + kv_heads) qk_width], sums over the sequence; null where the block has none
  float* qk_norm;     // [kv_heads, 2, qk_width], the same for queries and for keys
  float* decay_bias;  // [heads], the same
};

// Zeroes a row of P and dS outside of `keys`.
template <class T>
TRMFAST_INLINE void clear_unseen(const KeyRange& keys, int length, long row,
                                 const AttentionBackwardScratch<T>& scratch) {
  const long at = row * scratch.forward.weight_stride;
  const auto clear = [&](int from, int to) {
    for (int j = from; j < to; j += kLanes) {
      store(scratch.weights + at + j, vf{});
      store(scratch.grad_scores + at + j, vf{});
    }
  };
  clear(0, keys.begin);
  clear(keys.end, round_up(length, kPanel));
}

// P and dS of query rows row.. (n rows, multiplied together with `lead` rows before) into row `at` of the block's
// buffers, zero outside of what is seen.
template <class T>
KeyRange attention_grad_scores(const BlockShape& block, const Mask& mask, int length, const T* query, long stride,
                               const T* grad_out, long grad_stride, int row, int n, int lead, int at,
                               const AttentionBackwardScratch<T>& scratch) {
  const HeadLayout heads(block);
  const AttentionScratch<T>& forward = scratch.forward;
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(block.head_dim));
  float sums[Dot<T>::kRows];
  const KeyRange keys =
      attention_exponentials(block, mask, query, stride, row, n, lead, forward.scores + lead * forward.score_stride,
                             forward.score_stride, sums, forward);
  for (int k = keys.begin; k < keys.end; k += kPanel)
    multiply(grad_out + (row - lead) * grad_stride, grad_stride,
             scratch.values_transposed + k / kPanel * panel_elements<T>(heads.v_width), padded_depth<T>(heads.v_width),
             lead + n, scratch.grad_weights + k, forward.score_stride);
  for (int r = 0; r < n; ++r) {
    const float* e = forward.scores + static_cast<long>(lead + r) * forward.score_stride;
    const float* grad = scratch.grad_weights + static_cast<long>(lead + r) * forward.score_stride;
    T* p_out = scratch.weights + static_cast<long>(at + r) * forward.weight_stride;
    T* ds_out = scratch.grad_scores + static_cast<long>(at + r) * forward.weight_stride;
    const vf inverse = broadcast(1.0f / sums[r]);
    vf dots = {};
    for (int j = keys.begin; j < keys.end; j += kLanes) dots = fma(load(e + j), load(grad + j), dots);
    const vf mean = broadcast(sum(dots)) * inverse, factor = inverse * scale;
    for (int j = keys.begin; j < keys.end; j += kLanes) {
      store(p_out + j, load(e + j) * inverse);
      store(ds_out + j, load(e + j) * factor * (load(grad + j) - mean));
    }
    clear_unseen(keys, length, at + r, scratch);
  }
  return keys;
}

// The same for the decays of simple GLA.  What changes c_i or c_j by one changes P_ij by itself, up
// or down: dP P is added to the gradient of c_i and taken from that of c_j, and where i is j it would cancel.
template <class T>
KeyRange decayed_grad_scores(const BlockShape& block, const Mask& mask, int length, const T* query, long stride,
                             const T* grad_out, long grad_stride, int row, int n, int lead, int at,
                             const AttentionBackwardScratch<T>& scratch) {
  const HeadLayout heads(block);
  const AttentionScratch<T>& forward = scratch.forward;
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(block.head_dim));
  const KeyRange keys = mask.tile(row, n);
  const DecayTile decays(forward.decay, scale, keys, row, n);
  vf by_query[Dot<T>::kRows] = {};
  for (int k = keys.begin; k < keys.end; k += kPanel) {
    const long first = k / kPanel;
    multiply(query + (row - lead) * stride, stride, forward.keys + first * panel_elements<T>(heads.qk_width),
             padded_depth<T>(heads.qk_width), lead + n, forward.scores + k, forward.score_stride);
    multiply(grad_out + (row - lead) * grad_stride, grad_stride,
             scratch.values_transposed + first * panel_elements<T>(heads.v_width), padded_depth<T>(heads.v_width),
             lead + n, scratch.grad_weights + k, forward.score_stride);
    for (int j = k; j < k + kPanel; j += kLanes) {
      vf by_key = {};
      for (int r = 0; r < n; ++r) {
        const KeyRange seen = mask.seen(row + r);
        const long from = static_cast<long>(lead + r) * forward.score_stride + j;
        const long to = static_cast<long>(at + r) * forward.weight_stride + j;
        const vf decay = decays.at(r, j), grad = load(scratch.grad_weights + from);
        const vf p = load(forward.scores + from) * decay;
        store(scratch.weights + to, of_keys(p, seen, j));
        store(scratch.grad_scores + to, of_keys(grad * decay, seen, j));
        const vf through = of_keys(grad * p, {seen.begin, row + r}, j);
        by_query[r] += through;
        by_key += through;
      }
      for (int i = 0; i < kLanes; ++i) scratch.grad_total[j + i] -= static_cast<double>(by_key[i]);
    }
  }
  for (int r = 0; r < n; ++r) {
    scratch.grad_total[row + r] += static_cast<double>(sum(by_query[r]));
    clear_unseen(keys, length, at + r, scratch);
  }
  return keys;
}

// accumulator[L, columns] += x^T panels, x: [rows, L] (P or dS of a block), which is zero outside of `keys`.
template <class T>
void attention_accumulate(const T* x, int rows, int length, const KeyRange& keys, const T* panels, int columns,
                          float* accumulator, const AttentionBackwardScratch<T>& scratch) {
  const int end = smaller(keys.end, length);
  transpose(x + keys.begin, scratch.forward.weight_stride, rows, end - keys.begin,
            scratch.transposed + keys.begin * scratch.block_stride, scratch.block_stride);
  const RowTiles<Dot<T>> tiles(end - keys.begin);
  for (int c = 0; c < columns; c += kPanel)
    for (int i = 0; i < tiles.count; ++i) {
      const long row = keys.begin + tiles.begin(i);
      Dot<T>::run(scratch.transposed + row * scratch.block_stride, scratch.block_stride,
                  panels + c / kPanel * panel_elements<T>(rows), padded_depth<T>(rows),
                  larger(tiles.size(i), Dot<T>::kWholeRows), accumulator + row * columns + c, columns, true);
    }
}

// Through the gate of one head's output m = s o, with s the gate's sigmoid: grad_out, the gradient of m on entry, of o
// on return; grad_gates <- that of the gates before the sigmoid, dm m (1 - s).  mixed: m.  All rows are those of a
// sequence; grad_gates may be gates.
template <class T>
void gate_backward(const BlockShape& block, int head, int length, const T* gates, T* grad_gates, long stride,
                   const float* scale, const T* mixed, T* grad_out, long mixed_stride) {
  const int d = block.head_dim;
  for (int t = 0; t < length; ++t) {
    const T *gate = gates + t * stride, *m = mixed + t * mixed_stride + head * d;
    T *grad_gate = grad_gates + t * stride, *grad = grad_out + t * mixed_stride + head * d;
    const vf factor = broadcast(scale ? scale[t] : 1.0f);
    vf dots = {}, s = {};
    for (int c = 0; c < d; c += kLanes) {
      const int lanes = smaller(kLanes, d - c);
      s = gate_of(block, gate, head, c, lanes);
      const vf dm = load_lanes(grad + c, lanes), through = dm * load_lanes(m + c, lanes);
      if (block.gate == OutputGate::channel)
        store_lanes(grad_gate + head * d + c, through * (1.0f - s) * factor, lanes);
      else
        dots += through;
      store_lanes(grad + c, dm * s, lanes);
    }
    if (block.gate == OutputGate::head) store(grad_gate + head, broadcast(sum(dots)) * (1.0f - s) * factor, 1);
  }
}

// grads.qkv <- gradient of the query/key/value product.  grad_out: dO of the output `mixed`, overwritten where that has
// a gate.  Its padding columns must be finite: a padded depth reads them against zero weights.
template <class T>
void attention_backward(const Team& team, const BlockShape& block, const BlockVectors& vectors,
                        const Positions& positions, int length, const T* qkv, const AttentionGradients<T>& grads,
                        long stride, const T* mixed, T* grad_out, long mixed_stride,
                        const AttentionBackwardScratch<T>& scratch) {
  const HeadLayout heads(block);
  const AttentionScratch<T>& forward = scratch.forward;
  const RowTiles<Dot<T>> tiles(length);
  const Mask mask(block, length, positions.segments);
  const Rope& rope = positions.rope;
  const int group = heads.heads / heads.kv_heads, qk = heads.qk_width;
  const Range items = team.split(heads.kv_heads);
  const auto gradient_of = [&](int kv_head, bool of_keys, int head) {
    float* bias = grads.qk_bias ? grads.qk_bias + head * qk : nullptr;
    float* norm = grads.qk_norm ? grads.qk_norm + (2 * kv_head + of_keys) * qk : nullptr;
    return HeadGradient<T>{block,
                           rope,
                           length,
                           of_keys ? vectors.k_norm : vectors.q_norm,
                           grads.scale,
                           {bias, scratch.sums, qk},
                           {norm, scratch.sums + qk, qk}};
  };
  for (int kv_head = items.begin; kv_head < items.end; ++kv_head) {
    const HeadRows<T> key =
        norm_head({qkv + heads.key(kv_head), stride}, block, vectors.k_norm, rope, length, forward.normed.key);
    const T* value = qkv + heads.value(kv_head);
    pack_transposed(key.rows, key.stride, length, qk, forward.keys);
    pack_transposed(value, stride, length, heads.v_width, scratch.values_transposed);
    pack_rows(key.rows, key.stride, length, qk, scratch.keys_rows);
    __builtin_memset(scratch.grad_key, 0, sizeof(float) * static_cast<size_t>(length) * qk);
    __builtin_memset(scratch.grad_value, 0, sizeof(float) * static_cast<size_t>(length) * heads.v_width);
    const HeadGradient<T> to_key = gradient_of(kv_head, true, heads.heads + kv_head);
    if (to_key.norm.total) gradient_of(kv_head, false, 0).norm.clear();
    if (kv_head == 0) // products read these columns against zero weights
      clear_padding(grads.qkv, length, heads.gate() + heads.rows_ahead(), heads.columns(), stride);
    for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      const T* product = qkv + heads.query(head);
      const HeadRows<T> query = norm_head({product, stride}, block, vectors.q_norm, rope, length, forward.normed.query);
      const HeadGradient<T> to_query = gradient_of(kv_head, false, head);
      if (to_query.bias.total) to_query.bias.clear();
      T *grad_query = grads.qkv + heads.query(head), *grad = grad_out + head * heads.head_dim;
      if (block.gate != OutputGate::none)
        gate_backward(block, head, length, qkv + heads.gate(), grads.qkv + heads.gate(), stride, grads.scale, mixed,
                      grad_out, mixed_stride);
      const DecayLogits<T> logits = {qkv + heads.decay(head), stride, block.decay ? vectors.decay_bias[head] : 0.0f,
                                     length};
      if (block.decay) {
        sum_decays(logits, forward.decay);
        __builtin_memset(scratch.grad_total, 0, sizeof(double) * static_cast<size_t>(round_up(length, kPanel)));
      }
      for (int from = 0; from < tiles.count; from += attention_block_tiles<T>()) {
        const int to = smaller(tiles.count, from + attention_block_tiles<T>());
        const int row0 = tiles.begin(from), block_rows = tiles.begin(to) - row0;
        KeyRange seen = {length, 0};
        pack_rows(query.rows + row0 * query.stride, query.stride, block_rows, qk, scratch.query_rows);
        pack_rows(grad + row0 * mixed_stride, mixed_stride, block_rows, heads.head_dim, scratch.grad_rows);
        for (int i = from; i < to; ++i) {
          if (team.stopped()) return;
          const int row = tiles.begin(i), n = tiles.size(i);
          // Within the block.  The queries of these rows may hold their gradients already: nobody reads their scores.
          const int lead = smaller(tiles.lead(i), row - row0);
          const KeyRange keys = block.decay ? decayed_grad_scores(block, mask, length, query.rows, query.stride, grad,
                                                                  mixed_stride, row, n, lead, row - row0, scratch)
                                            : attention_grad_scores(block, mask, length, query.rows, query.stride, grad,
                                                                    mixed_stride, row, n, lead, row - row0, scratch);
          seen = {smaller(seen.begin, keys.begin), larger(seen.end, keys.end)};
          const T* grad_scores = scratch.grad_scores + static_cast<long>(row - row0 - lead) * forward.weight_stride;
          // To the end where rows see all or the past: the depth decides how an f32 product is summed.
          const int end = mask.narrow() ? smaller(keys.end, padded_depth<T>(length)) : padded_depth<T>(length);
          for (int c = 0; c < qk; c += kPanel)
            multiply(grad_scores + keys.begin, forward.weight_stride,
                     scratch.keys_rows + c / kPanel * panel_elements<T>(length) + keys.begin * kPanel, end - keys.begin,
                     lead + n, scratch.grad_query + c, qk);
          for (int r = 0; r < n; ++r)
            to_query.row(scratch.grad_query + static_cast<long>(lead + r) * qk, row + r, product + (row + r) * stride,
                         grad_query + (row + r) * stride);
        }
        attention_accumulate(scratch.weights, block_rows, length, seen, scratch.grad_rows, heads.v_width,
                             scratch.grad_value, scratch);
        attention_accumulate(scratch.grad_scores, block_rows, length, seen, scratch.query_rows, qk, scratch.grad_key,
                             scratch);
      }
      if (block.decay)
        grads.decay_bias[head] = decay_backward(logits, scratch.grad_total, grads.scale, grads.qkv + heads.decay(head));
    }
    if (to_key.bias.total) to_key.bias.clear();
    if (to_key.norm.total) to_key.norm.clear();
    for (int t = 0; t < length; ++t) {
      const long at = t * stride;
      to_key.row(scratch.grad_key + static_cast<long>(t) * qk, t, qkv + heads.key(kv_head) + at,
                 grads.qkv + heads.key(kv_head) + at);
      const vf factor = broadcast(grads.scale ? grads.scale[t] : 1.0f);
      const float* from = scratch.grad_value + static_cast<long>(t) * heads.v_width;
      T* to = grads.qkv + heads.value(kv_head) + at;
      for (int c = 0; c < heads.v_width; c += kLanes) store(to + c, load(from + c) * factor);
    }
  }
}

} // namespace TRMFAST_NAMESPACE
} // namespace trmfast
