// Attention of a CTA's rows over the whole sequence of its group.
//
//   project   h -> q into shared memory (rotated, packed order); rotated keys and values into the exchange
//   --------- group barrier: keys and values of all CTAs are complete
//   attend    a warp takes 16 or 32 rows of a head: online softmax over all keys; the output replaces q
//   output    [rows, heads * head_width] x W_o, then residual and norm (norm.cuh)
//
// Exchange of a group: [2][key, value][kv head][16 tokens][16 channels][lane][8]: squares in the order of fragments b
// (square_words), so both are read with one 16-byte load a lane, without shared memory.  Keys keep the packed order of
// channels, and so do queries: the sum over channels is the same.  Values come from a transposed product.
// The first dimension alternates from layer to layer: a CTA one layer ahead does not overwrite data still being read,
// and it cannot get further ahead.
#pragma once

#include "group.cuh"
#include "norm.cuh"
#include "rope.cuh"
#include "rows.cuh"

namespace trmfast {
namespace gpu {

// A group's exchange of keys and values in one layer.
template <class T> struct KeyValues {
  GlobalPtr<U32x4> base;        // of this lane
  int kv_heads, tiles, squares; // tiles: of 16 tokens; squares: of 16 channels in a head

  DEVICE KeyValues(const ForwardParams<T>& p, int layers_done, int row_tiles)
      : kv_heads(p.layout.block.kv_heads), tiles(p.group_blocks * row_tiles), squares(p.layout.head_width / 16) {
    const int each = 2 * kv_heads * tiles * squares * kSquare;
    base = (exchange_of_group(p) + (layers_done % 2 * each + lane_index() * 8)).template as<U32x4>();
  }
  DEVICE GlobalPtr<U32x4> at(int is_value, int kv_head, int tile, int square) const {
    return base + (((is_value * kv_heads + kv_head) * tiles + tile) * squares + square) * (kSquare / 8);
  }
};

// h: [rows, stride]; q: [rows, q_stride].
template <class T, int kStages, int kRowTiles, int kTiles>
DEVICE void project_qkv(const ForwardParams<T>& p, SharedPtr<const T> h, int stride, SharedPtr<T> q, int q_stride,
                        const KeyValues<T>& kv, WeightStream<T, kStages>& stream) {
  const LayerLayout& layout = p.layout;
  const int lane = lane_index(), g = lane / 4, t = lane % 4;
  const int first_row = Place::get().rank * 16 * kRowTiles, first_tile = first_row / 16;
  const int heads = layout.block.heads, kv_heads = layout.block.kv_heads;
  float acc[kRowTiles][kTiles][4];
  NO_UNROLL
  for (int pass = 0; pass < layout.qk_passes; ++pass) {
    clear(acc);
    multiply<Order::kStraight, Storage::kByRow>(acc, h, stride, layout.width_steps, stream);
    UNROLL
    for (int s = 0; s < kTiles / 2; ++s) {
      const int square = (pass * kWarps + warp_index()) * (kTiles / 2) + s;
      const int head = square / kv.squares, in_head = square % kv.squares;
      if (head < heads + kv_heads) {
        UNROLL
        for (int r = 0; r < kRowTiles; ++r) {
          rotate(acc[r][2 * s], acc[r][2 * s + 1], p, first_row + r * 16 + g, in_head * 8 + 2 * t);
          const U32x4 words = square_words<T>(acc[r][2 * s], acc[r][2 * s + 1]);
          if (head < heads) {
            const SharedPtr<uint32_t> to =
                (q + ((r * 16 + g) * q_stride + square * 16 + 2 * t)).template as<uint32_t>();
            store(to, words.v[0]);
            store(to + 4, words.v[1]);
            store(to + 4 * q_stride, words.v[2]);
            store(to + 4 * q_stride + 4, words.v[3]);
          } else {
            store(kv.at(0, head - heads, first_tile + r, in_head), words);
          }
        }
      }
    }
  }
  NO_UNROLL
  for (int pass = 0; pass < layout.v_passes; ++pass) {
    clear(acc);
    multiply<Order::kTransposed, Storage::kByRow>(acc, h, stride, layout.width_steps, stream);
    UNROLL
    for (int s = 0; s < kTiles / 2; ++s) {
      const int square = (pass * kWarps + warp_index()) * (kTiles / 2) + s;
      const int head = square / kv.squares;
      if (head < kv_heads) {
        UNROLL
        for (int r = 0; r < kRowTiles; ++r)
          store(kv.at(1, head, first_tile + r, square % kv.squares), square_words<T>(acc[r][2 * s], acc[r][2 * s + 1]));
      }
    }
  }
}

// Fragments b of 16 keys or values; from: of the head.
template <int kSquares>
DEVICE void load_fragments(U32x4 (&to)[kSquares], GlobalPtr<const U32x4> from, int tile) {
  UNROLL
  for (int s = 0; s < kSquares; ++s) to[s] = load(from + (tile * kSquares + s) * (kSquare / 8));
}

// Running maximum and sum of the softmax of 16 * kRowTiles rows; m is the largest raw score.
template <int kRowTiles> struct Softmax {
  float m[kRowTiles][2], l[kRowTiles][2];
};

// Scores s of keys `key0`.. become probabilities; `out` is scaled down where a row's maximum grew.
template <int kRowTiles, int kScoreTiles, int kOutTiles>
DEVICE void softmax_step(float (&s)[kRowTiles][kScoreTiles][4], float (&out)[kRowTiles][kOutTiles][4],
                         Softmax<kRowTiles>& state, float scale) {
  float grown[kRowTiles][2];
  bool any = false;
  UNROLL
  for (int r = 0; r < kRowTiles; ++r) {
    UNROLL
    for (int half = 0; half < 2; ++half) {
      float m = s[r][0][2 * half];
      UNROLL
      for (int n = 0; n < kScoreTiles; ++n) m = fmaxf(m, fmaxf(s[r][n][2 * half], s[r][n][2 * half + 1]));
      m = fmaxf(state.m[r][half], lanes_max<4>(m));
      grown[r][half] = fast_exp2((state.m[r][half] - m) * scale);
      any = any || m > state.m[r][half];
      state.m[r][half] = m;
      float sum = 0.0f;
      UNROLL
      for (int n = 0; n < kScoreTiles; ++n) {
        UNROLL
        for (int i = 0; i < 2; ++i) {
          float& x = s[r][n][2 * half + i];
          x = fast_exp2((x - m) * scale);
          sum += x;
        }
      }
      state.l[r][half] = state.l[r][half] * grown[r][half] + sum;
    }
  }
  if (!warp_any(any)) return;
  UNROLL
  for (int r = 0; r < kRowTiles; ++r) {
    UNROLL
    for (int n = 0; n < kOutTiles; ++n) {
      UNROLL
      for (int i = 0; i < 4; ++i) {
        out[r][n][i] *= grown[r][i / 2];
      }
    }
  }
}

// Scores of keys that row `row` (of elements 0 and 1, of the first row tile) must not see become -infinity.
template <int kRowTiles, int kScoreTiles>
DEVICE void mask_scores(float (&s)[kRowTiles][kScoreTiles][4], int row, int key, int length, bool causal) {
  UNROLL
  for (int r = 0; r < kRowTiles; ++r) {
    UNROLL
    for (int n = 0; n < kScoreTiles; ++n) {
      UNROLL
      for (int i = 0; i < 4; ++i) {
        const int at = key + n * 8 + i % 2;
        if (at >= length || (causal && at > row + r * 16 + i / 2 * 8)) s[r][n][i] = -INFINITY;
      }
    }
  }
}

// A warp: 16 * kRowTiles rows of one head, whose q [.., q_stride] is replaced by the output.  first_row: of these rows
// in the sequence.
template <int kSquares, int kRowTiles, class T>
DEVICE void attend(const ForwardParams<T>& p, SharedPtr<T> q_rows, int q_stride, int first_row, int kv_head,
                   const KeyValues<T>& kv) {
  const int lane = lane_index(), g = lane / 4, t = lane % 4;
  const bool causal = p.layout.block.causal;
  const float scale = 1.44269504f * fast_rsqrt(static_cast<float>(p.layout.block.head_dim));
  uint32_t q[kRowTiles][kSquares][4];
  const SharedPtr<const T> from = lane_rows<Storage::kByRow>(SharedPtr<const T>(q_rows), q_stride);
  UNROLL
  for (int r = 0; r < kRowTiles; ++r) {
    UNROLL
    for (int k = 0; k < kSquares; ++k) {
      ldmatrix_x4(q[r][k], from + (r * 16 * q_stride + k * 16));
    }
  }
  sync_warp(); // before the output overwrites q

  float out[kRowTiles][2 * kSquares][4];
  clear(out);
  Softmax<kRowTiles> state;
  UNROLL
  for (int r = 0; r < kRowTiles; ++r) {
    UNROLL
    for (int half = 0; half < 2; ++half) {
      state.m[r][half] = -INFINITY;
      state.l[r][half] = 0.0f;
    }
  }
  const int seen = causal ? smaller(p.length, first_row + 16 * kRowTiles) : p.length;
  const int steps = ceil_div(seen, 16), last_tile = steps - 1;
  const GlobalPtr<const U32x4> all_keys = kv.at(0, kv_head, 0, 0), all_values = kv.at(1, kv_head, 0, 0);
  U32x4 keys[kSquares], values[kSquares];
  load_fragments(keys, all_keys, 0);
  NO_UNROLL
  for (int step = 0; step < steps; ++step) {  // 16 keys
    load_fragments(values, all_values, step); // arrive during scores and softmax
    float s[kRowTiles][2][4];
    clear(s);
    UNROLL
    for (int c = 0; c < kSquares; ++c) {
      UNROLL
      for (int r = 0; r < kRowTiles; ++r) {
        mma_m16n8k16<T>(s[r][0], q[r][c], keys[c].v[0], keys[c].v[1]);
        mma_m16n8k16<T>(s[r][1], q[r][c], keys[c].v[2], keys[c].v[3]);
      }
    }
    load_fragments(keys, all_keys, smaller(step + 1, last_tile)); // arrive during softmax and output
    if (step * 16 + 16 > p.length || (causal && step * 16 + 15 > first_row))
      mask_scores(s, first_row + g, step * 16 + 2 * t, p.length, causal);
    softmax_step(s, out, state, scale);
    UNROLL
    for (int r = 0; r < kRowTiles; ++r) {
      const uint32_t a[4] = {pack<T>(s[r][0][0], s[r][0][1]), pack<T>(s[r][0][2], s[r][0][3]),
                             pack<T>(s[r][1][0], s[r][1][1]), pack<T>(s[r][1][2], s[r][1][3])};
      UNROLL
      for (int c = 0; c < kSquares; ++c) {
        mma_m16n8k16<T>(out[r][2 * c], a, values[c].v[0], values[c].v[1]);
        mma_m16n8k16<T>(out[r][2 * c + 1], a, values[c].v[2], values[c].v[3]);
      }
    }
  }
  UNROLL
  for (int r = 0; r < kRowTiles; ++r) {
    UNROLL
    for (int half = 0; half < 2; ++half) {
      const float inverse = fast_rcp(lanes_sum<4>(state.l[r][half]));
      const SharedPtr<T> to = q_rows + ((r * 16 + half * 8 + g) * q_stride + 2 * t);
      UNROLL
      for (int n = 0; n < 2 * kSquares; ++n)
        store((to + n * 8).template as<uint32_t>(),
              pack<T>(out[r][n][2 * half] * inverse, out[r][n][2 * half + 1] * inverse));
    }
  }
}

// All rows and heads of the CTA, split over its warps: warps that run side by side share a head.
template <int kSquares, int kTaskTiles, int kRowTiles, class T>
DEVICE void attend_heads(const ForwardParams<T>& p, SharedPtr<T> q, int q_stride, const KeyValues<T>& kv) {
  constexpr int kParts = kRowTiles / kTaskTiles;
  const int first_row = Place::get().rank * 16 * kRowTiles;
  const int heads = p.layout.block.heads, share = heads / p.layout.block.kv_heads;
  NO_UNROLL
  for (int task = warp_index(); task < heads * kParts; task += kWarps) {
    const int head = task / kParts, row = task % kParts * 16 * kTaskTiles;
    attend<kSquares, kTaskTiles>(p, q + (row * q_stride + head * kSquares * 16), q_stride, first_row + row,
                                 head / share, kv);
  }
}

// h1 = norm(h + attention(h)), in place.  work: shared memory after h; layers_done: by this kernel so far.  False: the
// group's barrier timed out.
template <class I, class T, int kStages>
DEVICE bool attention_mixer(const ForwardParams<T>& p, SharedPtr<T> h, SharedPtr<T> work, int layers_done,
                            WeightStream<T, kStages>& stream) {
  constexpr int kRowTiles = I::kRowTiles, kTiles = I::kWidthTiles, kStride = OwnRows<I>::kStride;
  const LayerLayout& layout = p.layout;
  const int q_stride = layout.block.heads * layout.head_width + kPad;
  {
    const KeyValues<T> kv(p, layers_done, kRowTiles);
    project_qkv<T, kStages, kRowTiles, kTiles>(p, h, kStride, work, q_stride, kv, stream);
  }
  if (!wait_for_group(p, layers_done + 1)) return false;
  {
    const KeyValues<T> kv(p, layers_done, kRowTiles);
    constexpr int kTwo = smaller(2, kRowTiles);
    if (layout.head_width == 32)
      attend_heads<2, kTwo, kRowTiles>(p, work, q_stride, kv);
    else if (layout.head_width == 64)
      attend_heads<4, kTwo, kRowTiles>(p, work, q_stride, kv);
    else
      attend_heads<8, 1, kRowTiles>(p, work, q_stride, kv);
  }
  block_sync();
  float acc[kRowTiles][kTiles][4];
  clear(acc);
  multiply<Order::kStraight, Storage::kByRow>(acc, SharedPtr<const T>(work), q_stride, layout.head_steps, stream);
  norm_rows(acc, h, kStride, layout.block.width, layout.block.eps, work.template as<float>());
  return true;
}

} // namespace gpu
} // namespace trmfast
