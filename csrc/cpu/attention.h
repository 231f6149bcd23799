// Attention of one (sequence, key/value head) at a time.  Keys and values are packed once; each tile of query
// rows then computes its scores against all keys (f32 [rows, L], in L1 or L2: never L x L), the softmax with the row
// maximum subtracted, and the product with the values.
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

// The larger of `most` and the first `valid` of 32 scores, lane by lane.
TRMFAST_INLINE vf largest_scores(const float* s, int valid, vf most) {
  const LaneIndex index;
  for (int j = 0; j < kPanel; j += kLanes) {
    const vf score = load(s + j);
    most = max(valid < kPanel ? (index.lanes < valid - j ? score : most) : score, most);
  }
  return most;
}

// exp(score - row maximum) for results rounded to T, and the factor to scale differences by first.  In f32 the
// maximum's exponential is exactly 1: backward, where P is f32, takes differences that must vanish in a saturated
// softmax.
template <class T> TRMFAST_INLINE vf exponential(vf difference) {
  return sizeof(T) == 2 ? exp2_for_bf16(difference) : exp(difference);
}
template <class T> constexpr float exponent_unit() { return sizeof(T) == 2 ? 1.44269504f : 1.0f; }

// Keys visible to the query rows before `row_end`.
TRMFAST_INLINE int visible_keys(const BlockShape& block, int row_end, int length) {
  return block.causal ? row_end : length;
}

// to[j] <- exp(s[j] - top) for j < valid, zero for valid <= j < padded; returns the sum.
template <class To>
TRMFAST_INLINE float exponentials(const float* s, float top, float scale, int valid, int padded, To* to) {
  const vf shift = broadcast(top), factor = broadcast(exponent_unit<To>() * scale);
  vf total[2] = {};
  int j = 0;
  for (; j + 2 * kLanes <= valid; j += 2 * kLanes) {
    for (int i = 0; i < 2; ++i) {
      const vf e = exponential<To>((load(s + j + i * kLanes) - shift) * factor);
      store(to + j + i * kLanes, e);
      total[i] += e;
    }
  }
  const LaneIndex index;
  for (; j < padded; j += kLanes) {
    vf e = {};
    if (j < valid) e = index.lanes < valid - j ? exponential<To>((load(s + j) - shift) * factor) : e;
    store(to + j, e);
    total[0] += e;
  }
  return sum(total[0] + total[1]);
}

// Exponentials of the scores of query rows row.. (n rows) into `to` [n, to_stride], T or float, and their sums.  Scores
// are computed panel by panel, and maxima taken while they are in L1.
template <class T, class To>
void attention_exponentials(const BlockShape& block, int length, const T* query, long stride, int row, int n, To* to,
                            long to_stride, float* sums, const AttentionScratch<T>& scratch) {
  const HeadLayout heads(block);
  const int depth = padded_depth<T>(heads.qk_width);
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(block.head_dim));
  const int keys = visible_keys(block, row + n, length);
  vf most[Dot<T>::kRows];
  for (int r = 0; r < n; ++r) most[r] = broadcast(-__builtin_inff());
  for (int k = 0; k < keys; k += kPanel) {
    multiply(query + row * stride, stride, scratch.keys + k / kPanel * panel_elements<T>(heads.qk_width), depth, n,
             scratch.scores + k, scratch.score_stride);
    for (int r = 0; r < n; ++r)
      most[r] = largest_scores(scratch.scores + static_cast<long>(r) * scratch.score_stride + k,
                               visible_keys(block, row + r + 1, length) - k, most[r]);
  }
  for (int r = 0; r < n; ++r)
    sums[r] = exponentials(scratch.scores + static_cast<long>(r) * scratch.score_stride, max_of(most[r]), scale,
                           visible_keys(block, row + r + 1, length), round_up(keys, kPanel), to + r * to_stride);
}

// mixed[row, head] <- softmax(q k^T / sqrt(d)) v for `sequences` sequences of `length` rows.
template <class T>
void attention_forward(const Team& team, const BlockShape& block, int sequences, int length, const T* qkv, long stride,
                       T* mixed, long mixed_stride, const AttentionScratch<T>& scratch) {
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
        if (team.stopped()) return;
        const int row = tiles.begin(i), n = tiles.size(i);
        attention_exponentials(block, length, rows + heads.query(head), stride, row, n, scratch.weights,
                               scratch.weight_stride, sums, scratch);
        const int keys = visible_keys(block, row + n, length);
        for (int c = 0; c < heads.v_width; c += kPanel) {
          multiply(scratch.weights, scratch.weight_stride, scratch.values + c / kPanel * panel_elements<T>(length),
                   padded_depth<T>(keys), n, scratch.tile, kPanel);
          for (int r = 0; r < n; ++r) {
            const vf inverse = broadcast(1.0f / sums[r]);
            T* to = mixed + (first + row + r) * mixed_stride + head * heads.head_dim + c;
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
