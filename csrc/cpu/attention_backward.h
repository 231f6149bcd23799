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
  T* transposed;               // P^T or dS^T, [L, block_stride]
  float* grad_key;             // [L, qk_width]
  float* grad_value;           // [L, v_width]
  long block_stride;

  AttentionBackwardScratch(Arena& arena, const HeadLayout& heads, int length)
      : forward(arena, heads, length), values_transposed(arena.take<T>(packed_elements<T>(heads.v_width, length))),
        keys_rows(arena.take<T>(packed_elements<T>(length, heads.qk_width))),
        query_rows(arena.take<T>(packed_elements<T>(attention_block_rows<T>(), heads.qk_width))),
        grad_rows(arena.take<T>(packed_elements<T>(attention_block_rows<T>(), heads.v_width))),
        grad_weights(arena.take<float>(static_cast<long>(Dot<T>::kRows) * forward.score_stride)),
        weights(arena.take<T>(static_cast<long>(attention_block_rows<T>()) * forward.weight_stride)),
        grad_scores(arena.take<T>(static_cast<long>(attention_block_rows<T>()) * forward.weight_stride)),
        transposed(arena.take<T>(length * row_stride(attention_block_rows<T>()))),
        grad_key(arena.take<float>(static_cast<long>(length) * heads.qk_width)),
        grad_value(arena.take<float>(static_cast<long>(length) * heads.v_width)),
        block_stride(row_stride(attention_block_rows<T>())) {}
};

// P and dS of query rows row.. (n rows) into row `at` of the block's buffers.
template <class T>
void attention_grad_scores(const BlockShape& block, int length, const T* query, long stride, const T* grad_out,
                           long grad_stride, int row, int n, int at, const AttentionBackwardScratch<T>& scratch) {
  const HeadLayout heads(block);
  const AttentionScratch<T>& forward = scratch.forward;
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(block.head_dim));
  const int keys = visible_keys(block, row + n, length);
  float sums[Dot<T>::kRows];
  attention_exponentials(block, length, query, stride, row, n, forward.scores, forward.score_stride, sums, forward);
  for (int k = 0; k < keys; k += kPanel)
    multiply(grad_out + row * grad_stride, grad_stride,
             scratch.values_transposed + k / kPanel * panel_elements<T>(heads.v_width), padded_depth<T>(heads.v_width),
             n, scratch.grad_weights + k, forward.score_stride);
  for (int r = 0; r < n; ++r) {
    const float* e = forward.scores + static_cast<long>(r) * forward.score_stride;
    const float* grad = scratch.grad_weights + static_cast<long>(r) * forward.score_stride;
    T* p_out = scratch.weights + static_cast<long>(at + r) * forward.weight_stride;
    T* ds_out = scratch.grad_scores + static_cast<long>(at + r) * forward.weight_stride;
    const vf inverse = broadcast(1.0f / sums[r]);
    const int padded = round_up(keys, kPanel);
    vf dots = {};
    for (int j = 0; j < padded; j += kLanes) dots = fma(load(e + j), load(grad + j), dots);
    const vf mean = broadcast(sum(dots)) * inverse, factor = inverse * scale;
    for (int j = 0; j < padded; j += kLanes) {
      store(p_out + j, load(e + j) * inverse);
      store(ds_out + j, load(e + j) * factor * (load(grad + j) - mean));
    }
    for (int j = padded; j < round_up(length, kPanel); j += kLanes) {
      store(p_out + j, vf{});
      store(ds_out + j, vf{});
    }
  }
}

// accumulator[L, columns] += x^T panels, x: [rows, L] (P or dS of a block).
template <class T>
void attention_accumulate(const T* x, int rows, int length, const T* panels, int columns, float* accumulator,
                          const AttentionBackwardScratch<T>& scratch) {
  transpose(x, scratch.forward.weight_stride, rows, length, scratch.transposed, scratch.block_stride);
  const RowTiles tiles(length, Dot<T>::kRows);
  for (int c = 0; c < columns; c += kPanel)
    for (int i = 0; i < tiles.count; ++i)
      Dot<T>::run(scratch.transposed + tiles.begin(i) * scratch.block_stride, scratch.block_stride,
                  panels + c / kPanel * panel_elements<T>(rows), padded_depth<T>(rows), tiles.size(i),
                  accumulator + static_cast<long>(tiles.begin(i)) * columns + c, columns, true);
}

// grad_qkv <- gradient of the query/key/value product (before rotation); it may be qkv itself.  grad_out: dO.  Its
// padding columns must be finite: a padded depth reads them against zero weights.
template <class T>
void attention_backward(const Team& team, const BlockShape& block, const Rope& rope, int sequences, int length,
                        const T* qkv, T* grad_qkv, long stride, const T* grad_out, long grad_stride,
                        const AttentionBackwardScratch<T>& scratch) {
  const HeadLayout heads(block);
  const AttentionScratch<T>& forward = scratch.forward;
  const RowTiles tiles(length, Dot<T>::kRows);
  const int group = heads.heads / heads.kv_heads, qk = heads.qk_width;
  const Range items = team.split(sequences * heads.kv_heads);
  const auto unrotate = [&](const float* in, int t, int c, T* out) {
    if (rope.cos)
      rotate_transposed(in, rope.cos + static_cast<long>(t) * qk + c, rope.sin + static_cast<long>(t) * qk + c, out);
    else
      store_group(in, out);
  };
  for (int item = items.begin; item < items.end; ++item) {
    const long first = static_cast<long>(item / heads.kv_heads) * length;
    const int kv_head = item % heads.kv_heads;
    const T* rows = qkv + first * stride;
    T* grad_rows = grad_qkv + first * stride;
    const T* key = rows + heads.key(kv_head);
    const T* value = rows + heads.value(kv_head);
    pack_transposed(key, stride, length, qk, forward.keys);
    pack_transposed(value, stride, length, heads.v_width, scratch.values_transposed);
    pack_rows(key, stride, length, qk, scratch.keys_rows);
    __builtin_memset(scratch.grad_key, 0, sizeof(float) * static_cast<size_t>(length) * qk);
    __builtin_memset(scratch.grad_value, 0, sizeof(float) * static_cast<size_t>(length) * heads.v_width);
    for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      const T* query = rows + heads.query(head);
      T* grad_query = grad_rows + heads.query(head);
      const T* grad = grad_out + first * grad_stride + head * heads.head_dim;
      for (int from = 0; from < tiles.count; from += attention_block_tiles<T>()) {
        const int to = smaller(tiles.count, from + attention_block_tiles<T>());
        const int row0 = tiles.begin(from), block_rows = tiles.begin(to) - row0;
        pack_rows(query + row0 * stride, stride, block_rows, qk, scratch.query_rows);
        pack_rows(grad + row0 * grad_stride, grad_stride, block_rows, heads.head_dim, scratch.grad_rows);
        for (int i = from; i < to; ++i) {
          if (team.stopped()) return;
          const int row = tiles.begin(i), n = tiles.size(i);
          attention_grad_scores(block, length, query, stride, grad, grad_stride, row, n, row - row0, scratch);
          for (int c = 0; c < qk; c += kPanel) {
            multiply(scratch.grad_scores + static_cast<long>(row - row0) * forward.weight_stride, forward.weight_stride,
                     scratch.keys_rows + c / kPanel * panel_elements<T>(length), padded_depth<T>(length), n,
                     forward.tile, kPanel);
            for_rows(row, n, forward.tile,
                     [&](int t, const float* in) { unrotate(in, t, c, grad_query + t * stride + c); });
          }
        }
        attention_accumulate(scratch.weights, block_rows, length, scratch.grad_rows, heads.v_width, scratch.grad_value,
                             scratch);
        attention_accumulate(scratch.grad_scores, block_rows, length, scratch.query_rows, qk, scratch.grad_key,
                             scratch);
      }
    }
    for (int t = 0; t < length; ++t) {
      for (int c = 0; c < qk; c += kPanel)
        unrotate(scratch.grad_key + static_cast<long>(t) * qk + c, t, c,
                 grad_rows + heads.key(kv_head) + t * stride + c);
      for (int c = 0; c < heads.v_width; c += kPanel)
        store_group(scratch.grad_value + static_cast<long>(t) * heads.v_width + c,
                    grad_rows + heads.value(kv_head) + t * stride + c);
    }
  }
}

} // namespace TRMFAST_NAMESPACE
} // namespace trmfast
