// The forward of a whole recursion program in one launch.
//
// The grid is `groups` groups of `group_blocks` CTAs; a group takes sequences `group`, `group + groups`, ..., one after
// the other, and must be resident as a whole.  A CTA owns 16 * kRowTiles tokens of the sequence.  Shared memory:
//
//   ring [warp][stage][512]    weights (stream.cuh)
//   h [rows, D + 8]            the running input of a block
//   work                       attention: q, then its output [rows, heads * head_width + 8]; SwiGLU: two chunks.
//                              Over tokens, a strip and its chunks take the place of h and work (mixer_mlp_t.cuh)
//
// States lie in global memory: an update reads its sources and x once and writes its state once.  What blocks of a
// group tell each other goes through the exchange: keys and values once a layer, or for mlp_t the rows twice.
#pragma once

#include "attention.cuh"
#include "mixer_mlp_t.cuh"
#include "swiglu.cuh"

namespace trmfast {
namespace gpu {

// An instance of the kernel.  Tiles of width and tokens are those of LayerLayout; kTokens and kStrips are 0 for
// attention.
template <class Element, int kRows, int kStages, int kWidth, int kTokens, int kStrips> struct Instance {
  using T = Element;
  static constexpr int kRowTiles = kRows, kRingStages = kStages, kWidthTiles = kWidth, kTokenTiles = kTokens,
                       kStripTiles = kStrips;
};

// Blocks of a group wait for each other here; everything before is then visible to all of them.
struct GroupBarrier {
  GlobalPtr<uint32_t> arrivals;
  uint32_t target, blocks;
  uint64_t timeout_ns;

  DEVICE bool operator()() {
    if (blocks == 1) {
      block_sync();
      return true;
    }
    target += blocks;
    return group_barrier(arrivals, target, timeout_ns);
  }
};

// a + b, element by element, rounded to T.
template <class T> DEVICE U32x4 add_parts(const U32x4& a, const U32x4& b) {
  U32x4 sum;
  UNROLL
  for (int i = 0; i < 4; ++i) {
    const F32x2 x = unpack<T>(a.v[i]), y = unpack<T>(b.v[i]);
    sum.v[i] = pack<T>(x.v[0] + y.v[0], x.v[1] + y.v[1]);
  }
  return sum;
}

// h <- sum of sources (+ x), added from the right and rounded after each addition (trmfast.reference.summed_input);
// rows beyond the sequence are zero.  written: bit s is set once state s lies in states_out.
template <class T>
DEVICE void sum_sources(const ForwardParams<T>& p, const PackedUpdate& update, uint32_t written, int sequence,
                        const OwnRows& rows, SharedPtr<T> h) {
  const int64_t sequence_elements = static_cast<int64_t>(p.length) * rows.width;
  const int64_t offset = sequence * sequence_elements + rows.offset();
  const int per_row = rows.width / 8, parts = rows.rows * per_row, valid = rows.valid() * per_row;
  const int terms = update.num_sources() + (update.inject_x() ? 1 : 0);
  NO_UNROLL
  for (int part0 = thread_index(); part0 < parts; part0 += kCopiesInFlight * kThreads) {
    U32x4 sum[kCopiesInFlight] = {};
    NO_UNROLL
    for (int term = terms - 1; term >= 0; --term) {
      GlobalPtr<const T> from = p.x;
      if (term < update.num_sources()) {
        const uint32_t source = load_nc(p.sources + (update.first_source() + term));
        from = (written >> source & 1) != 0 ? GlobalPtr<const T>(p.states_out[source]) : p.states_in[source];
      }
      const GlobalPtr<const U32x4> parts_of = (from + offset).template as<const U32x4>();
      UNROLL
      for (int i = 0; i < kCopiesInFlight; ++i) {
        const int part = part0 + i * kThreads;
        if (part < valid) {
          const U32x4 x = load(parts_of + part);
          sum[i] = term == terms - 1 ? x : add_parts<T>(x, sum[i]);
        }
      }
    }
    UNROLL
    for (int i = 0; i < kCopiesInFlight; ++i) {
      const int part = part0 + i * kThreads;
      if (part < parts) {
        store((h + (part / per_row * rows.stride + part % per_row * 8)).template as<U32x4>(), sum[i]);
        if (part < valid && update.saved() >= 0 && p.saved) {
          const int64_t at = static_cast<int64_t>(update.saved()) * p.batch * sequence_elements + offset;
          store((p.saved + at).template as<U32x4>() + part, sum[i]);
        }
      }
    }
  }
}

template <class I> DEVICE void recursion_forward(const ForwardParams<typename I::T>& p) {
  using T = typename I::T;
  using Stream = WeightStream<T, I::kRingStages>;
  const LayerLayout& layout = p.layout;
  const int width = layout.block.width;
  const int group = block_index() / p.group_blocks, rank = block_index() % p.group_blocks;
  const OwnRows rows{16 * I::kRowTiles, rank * 16 * I::kRowTiles, p.length, width, width + kPad};
  const SharedPtr<T> shared = shared_memory<T>();
  const SharedPtr<T> h = shared + Stream::kBytes / static_cast<int>(sizeof(T));
  const SharedPtr<T> work = h + rows.rows * rows.stride;
  const GlobalPtr<T> exchange = p.exchange + group * p.exchange_elements;
  GroupBarrier barrier{p.arrivals + group * kArrivalStride, 0, static_cast<uint32_t>(p.group_blocks), p.timeout_ns};

  int strips = 0;
  if constexpr (I::kTokenTiles > 0) strips = own_strips<I::kStripTiles>(width, rank, p.group_blocks);
  Stream stream(p, shared, group < p.batch ? ceil_div(p.batch - group, p.groups) : 0, strips);

  int parity = 0;
  bool in_step = true;
  for (int sequence = group; in_step && sequence < p.batch; sequence += p.groups) {
    const int64_t offset = static_cast<int64_t>(sequence) * p.length * width;
    uint32_t written = 0;
    for (int u = 0; in_step && u < p.num_updates; ++u) {
      const PackedUpdate update(load_nc(p.updates + u));
      sum_sources(p, update, written, sequence, rows, h);
      block_sync();
      const int layers = p.layers[update.net()];
      for (int layer = 0; layer < layers; ++layer) {
        if constexpr (I::kTokenTiles > 0) {
          in_step = sequence_mixer<I::kTokenTiles, I::kStripTiles>(p, h, rows, exchange, rank, stream, barrier);
        } else {
          in_step = attention_mixer<I::kWidthTiles, I::kRowTiles>(p, h, rows.stride, work, rows.first, exchange, parity,
                                                                  stream, barrier);
          parity ^= 1;
        }
        if (!in_step) break;
        float acc[I::kRowTiles][I::kWidthTiles][4];
        swiglu<Order::kStraight>(acc, SharedPtr<const T>(h), rows.stride, layout.width_steps, layout.inner_passes, work,
                                 stream);
        norm_rows(acc, h, rows.stride, width, layout.block.eps, work.template as<float>());
      }
      if (!in_step) break;
      rows.store_to(p.states_out[update.dst()] + offset, SharedPtr<const T>(h));
      written |= 1u << update.dst();
    }
    for (int s = 0; in_step && s < p.num_states; ++s) { // states that the program never writes
      if ((written >> s & 1) != 0) continue;
      rows.load_from(p.states_in[s] + offset, h);
      rows.store_to(p.states_out[s] + offset, SharedPtr<const T>(h));
    }
  }
  stream.drain();
  if (!in_step && thread_index() == 0) store(p.failed, 1u + static_cast<uint32_t>(group));
}

} // namespace gpu
} // namespace trmfast
