// Forward of a whole recursion program in one launch.
//
// The grid is `groups` groups of `group_blocks` CTAs; a group takes sequences `group`, `group + groups`, ... in
// turn, and must be fully resident.  A CTA owns 16 * kRowTiles tokens of the sequence.  Shared memory:
//
//   ring [warp][stage][512]    weights (stream.cuh)
//   h [rows, 256 or 512 + 8]   the running input of a block, zero beyond D
//   work                       attention: q, then its output [rows, heads * head_width + 8]; SwiGLU: two chunks.
//                              Over tokens, a strip and its chunks overwrite h and work (mixer_mlp_t.cuh)
//
// States are in global memory: an update reads its sources and x once and writes its state once.  Blocks of a
// group communicate through the exchange: keys and values once a layer, or for mlp_t the rows twice.
#pragma once

#include "attention.cuh"
#include "mixer_mlp_t.cuh"
#include "swiglu.cuh"

namespace trmfast {
namespace gpu {

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
// rows beyond the sequence are zero.
template <class I>
DEVICE void sum_sources(const ForwardParams<typename I::T>& p, const Step& step, int sequence,
                        SharedPtr<typename I::T> h) {
  using T = typename I::T;
  using Rows = OwnRows<I>;
  const Rows rows(p);
  const int64_t sequence_elements = static_cast<int64_t>(p.length) * rows.width;
  const int64_t offset = sequence * sequence_elements + rows.offset();
  const int valid = rows.valid();
  NO_UNROLL
  for (int column = lane_index() * 8; column < Rows::kColumns; column += 8 * kWarpSize) {
    NO_UNROLL
    for (int row = warp_index(); row < Rows::kRows; row += kCopiesInFlight * kWarps) {
      U32x4 sum[kCopiesInFlight] = {};
      bool mine[kCopiesInFlight];
      UNROLL
      for (int i = 0; i < kCopiesInFlight; ++i) mine[i] = row + i * kWarps < valid && column < rows.width;
      NO_UNROLL
      for (int term = step.num_sources() - 1; term >= 0; --term) {
        const uint32_t source = load_nc(p.sources + (step.first_source() + term)), state = source & 0xff;
        const GlobalPtr<const T> from = (source & kSourceIsX) != 0         ? p.x
                                        : (source & kSourceIsWritten) != 0 ? GlobalPtr<const T>(p.states_out[state])
                                                                           : p.states_in[state];
        UNROLL
        for (int i = 0; i < kCopiesInFlight; ++i) {
          const int64_t at = offset + (row + i * kWarps) * rows.width + column;
          if (mine[i]) sum[i] = add_parts<T>(load((from + at).template as<const U32x4>()), sum[i]);
        }
      }
      UNROLL
      for (int i = 0; i < kCopiesInFlight; ++i) {
        if (row + i * kWarps < Rows::kRows)
          store((h + ((row + i * kWarps) * Rows::kStride + column)).template as<U32x4>(), sum[i]);
        if (mine[i] && step.saved() >= 0 && p.saved) {
          const int64_t at = static_cast<int64_t>(step.saved()) * p.batch * sequence_elements + offset;
          store((p.saved + (at + (row + i * kWarps) * rows.width + column)).template as<U32x4>(), sum[i]);
        }
      }
    }
  }
}

// The group's current sequence after this many layers.
template <class T> DEVICE int sequence_of(const ForwardParams<T>& p, int layers_done) {
  return Place::get().group + layers_done / p.num_steps * p.groups;
}

// Copies the states that the program never writes from input to output.
template <class I>
DEVICE void copy_unwritten(const ForwardParams<typename I::T>& p, int64_t offset, SharedPtr<typename I::T> h) {
  NO_UNROLL
  for (int s = 0; s < kMostStates; ++s) {
    if ((p.unwritten >> s & 1) == 0) continue;
    OwnRows<I>(p).load_from(p.states_in[s] + offset, h);
    OwnRows<I>(p).store_to(p.states_out[s] + offset, SharedPtr<const typename I::T>(h));
  }
}

template <class I> DEVICE void recursion_forward(const ForwardParams<typename I::T>& p) {
  using T = typename I::T;
  using Stream = WeightStream<T, I::kRingStages>;
  const LayerLayout& layout = p.layout;
  const int width = layout.block.width;
  constexpr int kStride = OwnRows<I>::kStride;
  const SharedPtr<T> ring = shared_memory<T>(kPlaceBytes);
  const SharedPtr<T> h = ring + Stream::kElements, work = h + OwnRows<I>::kElements;

  Place::set(p);
  Stream stream(p, ring);
  // One round: a layer of an update of a sequence.
  for (int done = 0; done < Place::get().sequences * p.num_steps; ++done) {
    const int index = done % p.num_steps;
    if (const Step step(load_nc(p.steps + index)); step.is_first()) {
      sum_sources<I>(p, step, sequence_of(p, done), h);
      block_sync();
    }
    bool in_step;
    if constexpr (I::kTokenTiles > 0)
      in_step = mlp_t<I>(p, h, done, stream);
    else
      in_step = attention_mixer<I>(p, h, work, done, stream);
    if (!in_step) {
      stream.drain();
      if (thread_index() == 0) atomic_add(p.failed, 1u);
      return;
    }
    float acc[I::kRowTiles][I::kWidthTiles][4];
    swiglu<Order::kStraight>(acc, SharedPtr<const T>(h), kStride, layout.width_steps, layout.inner_passes, work,
                             stream);
    norm_rows(acc, h, kStride, width, layout.block.eps, work.template as<float>());
    if (const Step step(load_nc(p.steps + done % p.num_steps)); step.is_last()) {
      const int64_t offset = sequence_of(p, done) * (static_cast<int64_t>(p.length) * width);
      OwnRows<I>(p).store_to(p.states_out[step.dst()] + offset, SharedPtr<const T>(h));
      if ((done + 1) % p.num_steps == 0) copy_unwritten<I>(p, offset, h);
    }
  }
  stream.drain();
}

} // namespace gpu
} // namespace trmfast
