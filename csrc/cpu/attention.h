// Attention of one (sequence, key/value head) at a time.  Keys and values are packed once; then every tile of query
// rows makes its scores against all keys (f32 [rows, L], in L1 or L2: never L x L), a softmax with the row maximum
// subtracted, and its product with the values.
#pragma once

#include "arena.h"
#include "gemm.h"
#include "rope.h"

namespace trmfast {
namespace TRMFAST_NAMESPACE {

template <class T> struct AttentionScratch {
  T* keys;       // K^T panels, depth qk_width, columns L
  T* values;     // V panels, depth L, columns v_width
  float* scores; // [kRows, score_stride]
  T* weights;    // [kRows, weight_stride]
  float* tile;   // [kRows, 32]
  int score_stride, weight_stride;

  AttentionScratch(Arena& arena, const HeadLayout& heads, int length)
      : keys(arena.take<T>(packed_elements<T>(heads.qk_width, length))),
        values(arena.take<T>(packed_elements<T>(length, heads.v_width))),
        scores(arena.take<float>(static_cast<long>(Dot<T>::kRows) * round_up(length, kPanel))),
        weights(arena.take<T>(Dot<T>::kRows * row_stride(length))), tile(arena.take<float>(Dot<T>::kRows * kPanel)),
        score_stride(round_up(length, kPanel)), weight_stride(static_cast<int>(row_stride(length))) {}
};

struct LaneIndex {
  vi lanes;
  LaneIndex() : lanes{} {
    for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  }
};

// s[j] <- exp(scale (s[j] - max)) for j < valid, and 0 up to the next group; returns the sum.
TRMFAST_INLINE float softmax_row(float* s, int valid, float scale) {
  const LaneIndex index;
  const int full = valid / kLanes * kLanes;
  vf most = broadcast(-__builtin_inff());
  for (int j = 0; j < full; j += kLanes) most = max(load(s + j), most);
  if (full < valid) most = max(index.lanes < valid - full ? load(s + full) : most, most);
  const vf top = broadcast(max_of(most)), factor = broadcast(scale);
  vf total = {};
  for (int j = 0; j < full; j += kLanes) {
    const vf e = exp((load(s + j) - top) * factor);
    store(s + j, e);
    total += e;
  }
  int j = full;
  if (full < valid) {
    const vf e = index.lanes < valid - full ? exp((load(s + full) - top) * factor) : vf{};
    store(s + full, e);
    total += e;
    j += kLanes;
  }
  for (; j < round_up(valid, kPanel); j += kLanes) store(s + j, vf{});
  return sum(total);
}

// Keys that the query rows up to `row_end` see.
TRMFAST_INLINE int visible_keys(const BlockShape& block, int row_end, int length) {
  return block.causal ? row_end : length;
}

// Exponentials of the scores of query rows row.. (n rows) into scratch.scores, their sums into sums.
template <class T>
void attention_exponentials(const BlockShape& block, int length, const T* query, long stride, int row, int n,
                            float* sums, const AttentionScratch<T>& scratch) {
  const HeadLayout heads(block);
  const int depth = padded_depth<T>(heads.qk_width);
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(block.head_dim));
  const int keys = visible_keys(block, row + n, length);
  for (int k = 0; k < keys; k += kPanel)
    multiply(query + row * stride, stride, scratch.keys + k / kPanel * panel_elements<T>(heads.qk_width), depth, n,
             scratch.scores + k, scratch.score_stride);
  for (int r = 0; r < n; ++r) {
    float* s = scratch.scores + static_cast<long>(r) * scratch.score_stride;
    const int valid = visible_keys(block, row + r + 1, length);
    sums[r] = softmax_row(s, valid, scale);
    for (int j = round_up(valid, kPanel); j < round_up(keys, kPanel); j += kLanes) store(s + j, vf{});
  }
}

// attended[row, head] <- softmax(q k^T / sqrt(d)) v for `sequences` sequences of `length` rows.
template <class T>
void attention_forward(const Team& team, const BlockShape& block, int sequences, int length, const T* qkv, long stride,
                       T* attended, long attended_stride, const AttentionScratch<T>& scratch) {
  const HeadLayout heads(block);
  const RowTiles tiles(length, Dot<T>::kRows);
  const int group = heads.heads / heads.kv_heads;
  const Range items = team.split(sequences * heads.kv_heads);
  float sums[Dot<T>::kRows];
  for (int item = items.begin; item < items.end; ++item) {
    const long first = static_cast<long>(item / heads.kv_heads) * length;
    const int kv_head = item % heads.kv_heads;
    const T* rows = qkv + first * stride;
    pack_transposed(rows + heads.key(kv_head), stride, length, heads.qk_width, scratch.keys);
    pack_rows(rows + heads.value(kv_head), stride, length, heads.v_width, scratch.values);
    for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      for (int i = 0; i < tiles.count; ++i) {
        const int row = tiles.begin(i), n = tiles.size(i);
        attention_exponentials(block, length, rows + heads.query(head), stride, row, n, sums, scratch);
        const int keys = visible_keys(block, row + n, length);
        for (int r = 0; r < n; ++r)
          for (int j = 0; j < round_up(keys, kPanel); j += kPanel)
            store_group(scratch.scores + static_cast<long>(r) * scratch.score_stride + j,
                        scratch.weights + static_cast<long>(r) * scratch.weight_stride + j);
        for (int c = 0; c < heads.v_width; c += kPanel) {
          multiply(scratch.weights, scratch.weight_stride, scratch.values + c / kPanel * panel_elements<T>(length),
                   padded_depth<T>(keys), n, scratch.tile, kPanel);
          for (int r = 0; r < n; ++r) {
            const vf inverse = broadcast(1.0f / sums[r]);
            T* to = attended + (first + row + r) * attended_stride + head * heads.head_dim + c;
            const int columns = smaller(kPanel, heads.head_dim - c);
            for (int j = 0; j < columns; j += kLanes)
              store(to + j, load(scratch.tile + r * kPanel + j) * inverse, smaller(kLanes, columns - j));
          }
        }
      }
    }
  }
}

} // namespace TRMFAST_NAMESPACE
} // namespace trmfast
