// What backward reads of the updates with gradient, one slot per (update, sequence) pair.  The store is part of the
// backward workspace when activations are recomputed; otherwise forward fills it and keeps it.
#pragma once

#include "block_backward.h"

namespace trmfast {
namespace TRMFAST_NAMESPACE {

// The activations of one layer in `slots` slots.
template <class T> struct LayerActivations {
  BlockActivations<T> act = {};

  LayerActivations(Arena& arena, const BlockShape& block, int slots, int length) {
    const BlockStrides strides(block);
    const long rows = static_cast<long>(slots) * length;
    act.h = arena.take<T>(rows * strides.h);
    act.h1 = arena.take<T>(rows * strides.h);
    act.rstd2 = arena.take<float>(rows);
    act.gate_up = arena.take<T>(rows * strides.gate_up);
    act.activation = arena.take<T>(rows * strides.activation);
    if (block.conv_taps) act.gated = arena.take<T>(rows * strides.activation);
    if (block.attention) {
      act.qkv = arena.take<T>(rows * strides.qkv);
      act.mixed = arena.take<T>(rows * strides.mixed);
      act.rstd1 = arena.take<float>(rows);
    } else {
      act.mlp_t.gate_up = arena.take<T>(2L * slots * block.seq_inner * strides.h);
      act.mlp_t.activation = arena.take<T>(static_cast<long>(slots) * block.seq_inner * strides.h);
      act.mlp_t.rstd = arena.take<float>(slots * strides.u);
    }
  }

  LayerActivations at(const BlockShape& block, int slot, int length) const {
    const BlockStrides strides(block);
    const long row = static_cast<long>(slot) * length;
    LayerActivations moved = *this;
    moved.act.h += row * strides.h;
    moved.act.h1 += row * strides.h;
    moved.act.rstd2 += row;
    moved.act.gate_up += row * strides.gate_up;
    moved.act.activation += row * strides.activation;
    if (block.conv_taps) moved.act.gated += row * strides.activation;
    if (block.attention) {
      moved.act.qkv += row * strides.qkv;
      moved.act.mixed += row * strides.mixed;
      moved.act.rstd1 += row;
    } else {
      moved.act.mlp_t.gate_up += 2L * slot * block.seq_inner * strides.h;
      moved.act.mlp_t.activation += static_cast<long>(slot) * block.seq_inner * strides.h;
      moved.act.mlp_t.rstd += slot * strides.u;
    }
    return moved;
  }
};

// The gradients of one layer that weight gradients read.  Where the activations are this pass's own, d(q, k, v) and
// d(gate, up) take their places.
template <class T> struct LayerGradients {
  BlockGradients<T> grads = {};

  LayerGradients(Arena& arena, const BlockShape& block, int slots, int length, bool in_place) {
    const BlockStrides strides(block);
    const long rows = static_cast<long>(slots) * length;
    grads.ds1 = arena.take<T>(rows * strides.h);
    grads.ds2 = arena.take<T>(rows * strides.h);
    if (block.conv_taps) grads.dconvolved = arena.take<T>(rows * strides.activation);
    if (in_place) return;
    grads.gate_up = arena.take<T>(rows * strides.gate_up);
    if (block.attention)
      grads.qkv = arena.take<T>(rows * strides.qkv);
    else
      grads.sequence_gate_up = arena.take<T>(2L * slots * block.seq_inner * strides.h);
  }

  LayerGradients at(const BlockShape& block, int slot, int length) const {
    const BlockStrides strides(block);
    const long row = static_cast<long>(slot) * length;
    LayerGradients moved = *this;
    moved.grads.ds1 += row * strides.h;
    moved.grads.ds2 += row * strides.h;
    if (block.conv_taps) moved.grads.dconvolved += row * strides.activation;
    if (!grads.gate_up) return moved;
    moved.grads.gate_up += row * strides.gate_up;
    if (block.attention)
      moved.grads.qkv += row * strides.qkv;
    else
      moved.grads.sequence_gate_up += 2L * slot * block.seq_inner * strides.h;
    return moved;
  }
};

inline int most_layers(const Job& job) {
  int most = 0;
  for (int n = 0; n < job.num_nets; ++n) most = larger(most, job.nets[n].layers);
  return most;
}

// Slots of all updates with gradient.
inline int all_slots(const Job& job) {
  int updates = 0;
  for (int i = 0; i < job.program.num_updates; ++i) updates += job.program.updates[i].grad;
  return updates * job.batch;
}

// Activations of every layer, and the output of the last one.  A kept store holds the slots of all updates in the order
// in which backward takes them: the last update first, and the sequences of an update in their order.
template <class T> class ActivationStore {
public:
  ActivationStore(Arena& arena, const Job& job, int slots)
      : block_(job.nets[0].block), slots_(slots), length_(job.length) {
    Arena one(nullptr);
    LayerActivations<T>(one, block_, slots, length_);
    per_layer_ = one.used();
    first_ = arena.take<char>(static_cast<long>(per_layer_) * most_layers(job));
    out_ = arena.take<T>(static_cast<long>(slots) * length_ * BlockStrides(block_).h);
  }
  BlockActivations<T> layer(int index, int slot) const {
    Arena arena(first_ + per_layer_ * static_cast<size_t>(index));
    return LayerActivations<T>(arena, block_, slots_, length_).at(block_, slot, length_).act;
  }
  T* out(int slot) const { return out_ + static_cast<long>(slot) * length_ * BlockStrides(block_).h; }
  // Where layer `index` of `layers` writes its output.
  T* output(int index, int layers, int slot) const { return index + 1 < layers ? layer(index + 1, slot).h : out(slot); }

  // Zeroes what products read beyond the last column, in the rows of a range of slots.
  void clear_padding(int layers, const Range& slots) const {
    const int rows = (slots.end - slots.begin) * length_;
    for (int i = 0; i < layers; ++i) clear_activation_padding(block_, rows, layer(i, slots.begin));
    TRMFAST_NAMESPACE::clear_padding(out(slots.begin), rows, block_.width, round_up(block_.width, kPanel),
                                     BlockStrides(block_).h);
  }

private:
  const BlockShape& block_;
  int slots_, length_;
  size_t per_layer_;
  char* first_;
  T* out_;
};

template <class T> class GradientStore {
public:
  GradientStore(Arena& arena, const Job& job, int slots, bool in_place)
      : block_(job.nets[0].block), slots_(slots), length_(job.length), in_place_(in_place) {
    Arena one(nullptr);
    LayerGradients<T>(one, block_, slots, length_, in_place);
    per_layer_ = one.used();
    first_ = arena.take<char>(static_cast<long>(per_layer_) * most_layers(job));
  }
  // act: the activations of the same slot.
  BlockGradients<T> layer(int index, int slot, const BlockActivations<T>& act) const {
    Arena arena(first_ + per_layer_ * static_cast<size_t>(index));
    BlockGradients<T> grads =
        LayerGradients<T>(arena, block_, slots_, length_, in_place_).at(block_, slot, length_).grads;
    if (in_place_) {
      grads.qkv = act.qkv;
      grads.gate_up = act.gate_up;
      grads.sequence_gate_up = act.mlp_t.gate_up;
    }
    return grads;
  }

private:
  const BlockShape& block_;
  int slots_, length_;
  bool in_place_;
  size_t per_layer_;
  char* first_;
};

} // namespace TRMFAST_NAMESPACE
} // namespace trmfast
