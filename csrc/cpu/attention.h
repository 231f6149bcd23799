// Attention of one (sequence, key/value head) at a time.  Keys and values are packed once; each tile of query
// rows then computes its scores against the keys it sees (f32 [rows, L], in L1 or L2: never L x L), the softmax with
// the row maximum subtracted or their decays (simple_gla.h), and the product with the values.
#pragma once

#include "arena.h"
#include "gemm.h"
#include "head_norm.h"
#include "mask.h"
#include "simple_gla.h"
#include "swiglu.h"
#include "weights.h"

namespace trmfast {
namespace TRMFAST_NAMESPACE {

template <class T> struct AttentionScratch {
  T* keys;       // K^T panels, depth qk_width, columns L
  T* values;     // V panels, depth L, columns v_width
  float* scores; // [kRows, score_stride]
  T* weights;    // [kRows, weight_stride]
  float* tile;   // [kRows, 32]
  HeadNormScratch<T> normed;
  DecayScratch decay;
  int score_stride, weight_stride;

  AttentionScratch(Arena& arena, const BlockShape& block, int length)
      : AttentionScratch(arena, block, HeadLayout(block), block.attention ? length : 0) {}

private:
  AttentionScratch(Arena& arena, const BlockShape& block, const HeadLayout& heads, int length)
      : keys(arena.take<T>(packed_elements<T>(heads.qk_width, length))),
        values(arena.take<T>(packed_elements<T>(length, heads.v_width))),
        scores(arena.take<float>(static_cast<long>(Dot<T>::kRows) * row_stride(length))),
        weights(arena.take<T>(Dot<T>::kRows * row_stride(length))), tile(arena.take<float>(Dot<T>::kRows * kPanel)),
        normed(arena, block, length), decay(arena, block, length, Dot<T>::kRows),
        score_stride(static_cast<int>(row_stride(length))), weight_stride(static_cast<int>(row_stride(length))) {}
};

// The larger of `most` and those of 32 scores that are seen, lane by lane; the first score is that of key `first`.
TRMFAST_INLINE vf largest_scores(const float* s, int first, const KeyRange& seen, vf most) {
  const LaneIndex index;
  const int begin = seen.begin - first, end = seen.end - first;
  for (int j = 0; j < kPanel; j += kLanes) {
    const vf score = load(s + j);
    const bool all = begin <= 0 && end >= kPanel;
    most = max(all ? score : (index.lanes >= begin - j) & (index.lanes < end - j) ? score : most, most);
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

// to[j] <- exp(s[j] - top) for the keys j that are seen, zero for the others of `tile`; returns the sum.
template <class To>
TRMFAST_INLINE float exponentials(const float* s, float top, float scale, const KeyRange& seen, const KeyRange& tile,
                                  To* to) {
  const vf shift = broadcast(top), factor = broadcast(exponent_unit<To>() * scale);
  const LaneIndex index;
  vf total[2] = {};
  int j = tile.begin;
  for (; j < seen.begin; j += kLanes) {
    vf e = {};
    if (j + kLanes > seen.begin)
      e = (index.lanes >= seen.begin - j) & (index.lanes < seen.end - j)
              ? exponential<To>((load(s + j) - shift) * factor)
              : e;
    store(to + j, e);
    total[0] += e;
  }
  for (; j + 2 * kLanes <= seen.end; j += 2 * kLanes) {
    for (int i = 0; i < 2; ++i) {
      const vf e = exponential<To>((load(s + j + i * kLanes) - shift) * factor);
      store(to + j + i * kLanes, e);
      total[i] += e;
    }
  }
  for (; j < tile.end; j += kLanes) {
    vf e = {};
    if (j < seen.end) e = index.lanes < seen.end - j ? exponential<To>((load(s + j) - shift) * factor) : e;
    store(to + j, e);
    total[0] += e;
  }
  return sum(total[0] + total[1]);
}

// Exponentials of the scores of query rows row.. (n rows) into `to` [n, to_stride], T or float, and their sums.  Scores
// are computed panel by panel, for `lead` rows before too (RowTiles), and maxima taken while they are in L1.  Returns
// the keys that `to` holds.
template <class T, class To>
KeyRange attention_exponentials(const BlockShape& block, const Mask& mask, const T* query, long stride, int row, int n,
                                int lead, To* to, long to_stride, float* sums, const AttentionScratch<T>& scratch) {
  const HeadLayout heads(block);
  const int depth = padded_depth<T>(heads.qk_width);
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(block.head_dim));
  const float* scores = scratch.scores + static_cast<long>(lead) * scratch.score_stride;
  const KeyRange tile = mask.tile(row, n);
  KeyRange seen[Dot<T>::kRows];
  vf most[Dot<T>::kRows];
  for (int r = 0; r < n; ++r) {
    seen[r] = mask.seen(row + r);
    most[r] = broadcast(-__builtin_inff());
  }
  for (int k = tile.begin; k < tile.end; k += kPanel) {
    multiply(query + (row - lead) * stride, stride, scratch.keys + k / kPanel * panel_elements<T>(heads.qk_width),
             depth, lead + n, scratch.scores + k, scratch.score_stride);
    for (int r = 0; r < n; ++r)
      most[r] = largest_scores(scores + static_cast<long>(r) * scratch.score_stride + k, k, seen[r], most[r]);
  }
  for (int r = 0; r < n; ++r)
    sums[r] = exponentials(scores + static_cast<long>(r) * scratch.score_stride, max_of(most[r]), scale, seen[r], tile,
                           to + r * to_stride);
  return tile;
}

// The same for the decays of simple GLA, whose sums are those that the scratch holds: scores times
// decays, zero for keys that a row does not see.
template <class T, class To>
KeyRange decayed_scores(const BlockShape& block, const Mask& mask, const T* query, long stride, int row, int n,
                        int lead, To* to, long to_stride, float* sums, const AttentionScratch<T>& scratch) {
  const HeadLayout heads(block);
  const int depth = padded_depth<T>(heads.qk_width);
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(block.head_dim));
  const float* scores = scratch.scores + static_cast<long>(lead) * scratch.score_stride;
  const KeyRange keys = mask.tile(row, n);
  const DecayTile decays(scratch.decay, scale, keys, row, n);
  for (int k = keys.begin; k < keys.end; k += kPanel) {
    multiply(query + (row - lead) * stride, stride, scratch.keys + k / kPanel * panel_elements<T>(heads.qk_width),
             depth, lead + n, scratch.scores + k, scratch.score_stride);
    for (int r = 0; r < n; ++r) {
      const KeyRange seen = mask.seen(row + r);
      for (int j = k; j < k + kPanel; j += kLanes) {
        const vf score = load(scores + static_cast<long>(r) * scratch.score_stride + j);
        store(to + r * to_stride + j, of_keys(score * decays.at(r, j), seen, j));
      }
    }
  }
  for (int r = 0; r < n; ++r) sums[r] = 1;
  return keys;
}

// Channels of a head's gate, from the gate columns of a token.
template <class T>
TRMFAST_INLINE vf gate_of(const BlockShape& block, const T* gates, int head, int channel, int lanes) {
  if (block.gate == OutputGate::channel) return sigmoid<T>(load_lanes(gates + head * block.head_dim + channel, lanes));
  return sigmoid<T>(broadcast(to_float(gates[head])));
}

// mixed[row, head] <- softmax(q k^T / sqrt(d)) v, or with decays in place of the softmax, times its gate, for
// `sequences` sequences of `length` rows.
template <class T>
void attention_forward(const Team& team, const BlockShape& block, const BlockVectors& vectors,
                       const Positions& positions, int sequences, int length, const T* qkv, long stride, T* mixed,
                       long mixed_stride, const AttentionScratch<T>& scratch) {
  const HeadLayout heads(block);
  const RowTiles<Dot<T>> tiles(length);
  const int group = heads.heads / heads.kv_heads;
  const Range items = team.split(sequences * heads.kv_heads);
  float sums[Dot<T>::kRows];
  for (int item = items.begin; item < items.end; ++item) {
    const long first = static_cast<long>(item / heads.kv_heads) * length;
    const int kv_head = item % heads.kv_heads;
    const T* rows = qkv + first * stride;
    const Mask mask(block, length, positions.of(item / heads.kv_heads, length).segments);
    const Rope& rope = positions.rope;
    const HeadRows<T> key =
        norm_head({rows + heads.key(kv_head), stride}, block, vectors.k_norm, rope, length, scratch.normed.key);
    pack_transposed(key.rows, key.stride, length, heads.qk_width, scratch.keys);
    pack_rows(rows + heads.value(kv_head), stride, length, heads.v_width, scratch.values);
    for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      const HeadRows<T> query =
          norm_head({rows + heads.query(head), stride}, block, vectors.q_norm, rope, length, scratch.normed.query);
      if (block.decay)
        sum_decays(DecayLogits<T>{rows + heads.decay(head), stride, vectors.decay_bias[head], length}, scratch.decay);
      for (int i = 0; i < tiles.count; ++i) {
        if (team.stopped()) return;
        const int row = tiles.begin(i), n = tiles.size(i), lead = tiles.lead(i);
        T* to = scratch.weights + lead * scratch.weight_stride;
        const KeyRange keys = block.decay ? decayed_scores(block, mask, query.rows, query.stride, row, n, lead, to,
                                                           scratch.weight_stride, sums, scratch)
                                          : attention_exponentials(block, mask, query.rows, query.stride, row, n, lead,
                                                                   to, scratch.weight_stride, sums, scratch);
        for (int c = 0; c < heads.v_width; c += kPanel) {
          multiply(scratch.weights + keys.begin, scratch.weight_stride,
                   scratch.values + c / kPanel * panel_elements<T>(length) + static_cast<long>(keys.begin) * kPanel,
                   padded_depth<T>(mask.end(row, n) - keys.begin), lead + n, scratch.tile, kPanel);
          for (int r = 0; r < n; ++r) {
            const vf inverse = broadcast(1.0f / sums[r]);
            const T* gates = rows + (row + r) * stride + heads.gate();
            T* to = mixed + (first + row + r) * mixed_stride + head * heads.head_dim + c;
            const int columns = smaller(kPanel, heads.head_dim - c);
            for (int j = 0; j < columns; j += kLanes) {
              const int lanes = smaller(kLanes, columns - j);
              vf value = load(scratch.tile + (lead + r) * kPanel + j) * inverse;
              if (block.gate != OutputGate::none) value *= gate_of(block, gates, head, c + j, lanes);
              store(to + j, value, lanes);
            }
          }
        }
      }
    }
  }
}

} // namespace TRMFAST_NAMESPACE
} // namespace trmfast
