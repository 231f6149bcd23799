// What backward reads of the updates with gradient, one slot per (update, sequence) pair.  Forward keeps whole pairs,
// and the outputs of the blocks of others, as the budget has room; the backward workspace has a store for what is
// recomputed.
#pragma once

#include "injection.h"

namespace trmfast {
namespace TRMFAST_NAMESPACE {

// The arrays of one layer's activations, each with its elements of one slot.
template <class T, class Visit>
void visit_arrays(BlockActivations<T>& act, const BlockShape& block, int length, const Visit& visit) {
  const BlockStrides strides(block);
  visit(act.h, length * strides.h);
  visit(act.h1, length * strides.h);
  if (has_result_norm(block)) visit(act.rstd2, length);
  if (block.input_norm) visit(act.input_rstd2, length);
  if (keeps_normed(block)) visit(act.normed2, length * strides.h);
  visit(act.gate_up, length * strides.gate_up);
  visit(act.activation, length * strides.activation);
  if (block.conv_taps) visit(act.convolved, length * strides.activation);
  if (block.attention) {
    visit(act.qkv, length * strides.qkv);
    visit(act.mixed, length * strides.mixed);
    if (has_result_norm(block)) visit(act.rstd1, length);
    if (block.input_norm) visit(act.input_rstd1, length);
    if (keeps_normed(block)) visit(act.normed1, length * strides.h);
  } else {
    visit(act.mlp_t.gate_up, 2 * block.seq_inner * strides.h);
    visit(act.mlp_t.activation, block.seq_inner * strides.h);
    visit(act.mlp_t.rstd, strides.u);
  }
}

// The same for the gradients that weight gradients read.  Where the workspace has a store of activations (in_place),
// d(q, k, v) and d(gate, up) take their places there.
template <class T, class Visit>
void visit_arrays(BlockGradients<T>& grads, const BlockShape& block, int length, bool in_place, const Visit& visit) {
  const BlockStrides strides(block);
  visit(grads.ds1, length * strides.h);
  visit(grads.ds2, length * strides.h);
  if (block.conv_taps) visit(grads.dconv, length * strides.activation);
  const WeightPlaces places(block);
  const HeadLayout heads(block);
  if (places.result_norm[0] >= 0) visit(grads.result_norm1, strides.u);
  if (places.result_norm[1] >= 0) visit(grads.result_norm2, strides.u);
  if (places.qk_bias >= 0) visit(grads.qk_bias, heads.value(0));
  if (places.decay_bias >= 0) visit(grads.decay_bias, heads.decays);
  if (places.q_norm >= 0) visit(grads.qk_norm, 2 * heads.kv_heads * heads.qk_width);
  if (in_place) return;
  visit(grads.gate_up, length * strides.gate_up);
  if (block.attention)
    visit(grads.qkv, length * strides.qkv);
  else
    visit(grads.sequence_gate_up, 2 * block.seq_inner * strides.h);
}

// Takes an array of `slots` slots and points to one of them.
struct TakeSlots {
  Arena& arena;
  int slots, slot;

  template <class T> void operator()(T*& array, long per_slot) const {
    array = arena.take<T>(slots * per_slot) + slot * per_slot;
  }
};

inline int most_layers(const Job& job) {
  int most = 0;
  for (int n = 0; n < job.num_nets; ++n) most = larger(most, job.nets[n].layers);
  return most;
}

// All (update, sequence) pairs of the window.
inline int all_pairs(const Job& job) {
  int updates = 0;
  for (int i = 0; i < job.program.num_updates; ++i) updates += job.program.updates[i].grad;
  return updates * job.batch;
}

// Of some pairs in backward's order: how many are kept whole, how many of the next ones with the outputs of their
// blocks, and the first slot of those.
struct KeptPart {
  int whole, with_outputs, slot;

  KeptPart(const Kept& kept, int pair, int count)
      : whole(smaller(larger(kept.pairs - pair, 0), count)),
        with_outputs(smaller(larger(kept.pairs + kept.output_pairs - pair - whole, 0), count - whole)),
        slot(pair + whole - kept.pairs) {}
};

// Whether a net of the job has a final norm.
inline bool has_final_norm(const Job& job) {
  for (int n = 0; n < job.num_nets; ++n)
    if (job.nets[n].final_norm) return true;
  return false;
}

// Whether a net of the job has such an injection.
inline bool has_injection(const Job& job, Injection kind) {
  for (int n = 0; n < job.num_nets; ++n)
    if (job.nets[n].injection == kind) return true;
  return false;
}
inline bool has_injection_weight(const Job& job) {
  return has_injection(job, Injection::diagonal) || has_injection(job, Injection::linear);
}

// Activations of every layer, the output of the last one and of the final norm, and what an injection weighs.  Slot i
// of a kept store is that of pair i (Kept).
template <class T> class ActivationStore {
public:
  ActivationStore(Arena& arena, const Job& job, int slots)
      : block_(job.nets[0].block), slots_(slots), length_(job.length) {
    Arena one(nullptr);
    take(one, 0);
    per_layer_ = one.used();
    first_ = arena.take<char>(static_cast<long>(per_layer_) * most_layers(job));
    out_ = arena.take<T>(static_cast<long>(slots) * length_ * BlockStrides(block_).h);
    if (has_injection_weight(job)) total_ = arena.take<T>(static_cast<long>(slots) * length_ * BlockStrides(block_).h);
    if (!has_final_norm(job)) return;
    normed_ = arena.take<T>(static_cast<long>(slots) * length_ * BlockStrides(block_).h);
    final_rstd_ = arena.take<float>(static_cast<long>(slots) * length_);
  }
  BlockActivations<T> layer(int index, int slot) const {
    Arena arena(first_ + per_layer_ * static_cast<size_t>(index));
    return take(arena, slot);
  }
  T* out(int slot) const { return out_ + static_cast<long>(slot) * length_ * BlockStrides(block_).h; }
  // The sum of an update's sources, [L, stride of h]; null if no injection has a weight.
  T* total(int slot) const {
    return total_ ? total_ + static_cast<long>(slot) * length_ * BlockStrides(block_).h : nullptr;
  }
  // The plain output of the final norm, [L, stride of h], and its rstd.
  T* normed(int slot) const { return normed_ + static_cast<long>(slot) * length_ * BlockStrides(block_).h; }
  float* final_rstd(int slot) const { return final_rstd_ + static_cast<long>(slot) * length_; }
  // Where layer `index` of `layers` writes its output.
  T* output(int index, int layers, int slot) const { return index + 1 < layers ? layer(index + 1, slot).h : out(slot); }

  // Copies a slot of another store; the threads of a team share the arrays.
  void copy(const Team& team, int layers, const ActivationStore& store, int from, int to) const {
    constexpr int kMostArrays = 16;
    for (int i = 0; i < layers; ++i) {
      BlockActivations<T> source = store.layer(i, from), target = layer(i, to);
      const void* arrays[kMostArrays];
      int found = 0, written = 0;
      visit_arrays(source, block_, length_, [&](const auto* array, long) { arrays[found++] = array; });
      visit_arrays(target, block_, length_, [&](auto* array, long elements) {
        if (written % team.size == team.rank)
          __builtin_memcpy(array, arrays[written], sizeof(*array) * static_cast<size_t>(elements));
        ++written;
      });
    }
    if (team.rank) return;
    const size_t bytes = sizeof(T) * static_cast<size_t>(length_) * static_cast<size_t>(BlockStrides(block_).h);
    __builtin_memcpy(out(to), store.out(from), bytes);
    if (total_) __builtin_memcpy(total(to), store.total(from), bytes);
    if (!normed_) return;
    __builtin_memcpy(normed(to), store.normed(from), bytes);
    __builtin_memcpy(final_rstd(to), store.final_rstd(from), sizeof(float) * static_cast<size_t>(length_));
  }

  // Zeroes what products read beyond the last column, in the rows of a range of slots.
  void clear_padding(int layers, const Range& slots) const {
    const int rows = (slots.end - slots.begin) * length_;
    for (int i = 0; i < layers; ++i) clear_activation_padding(block_, rows, layer(i, slots.begin));
    const auto clear = [&](T* array) {
      TRMFAST_NAMESPACE::clear_padding(array, rows, block_.width, round_up(block_.width, kPanel),
                                       BlockStrides(block_).h);
    };
    clear(out(slots.begin));
    clear(total(slots.begin));
  }

private:
  BlockActivations<T> take(Arena& arena, int slot) const {
    BlockActivations<T> act = {};
    visit_arrays(act, block_, length_, TakeSlots{arena, slots_, slot});
    return act;
  }

  const BlockShape& block_;
  int slots_, length_;
  size_t per_layer_;
  char* first_;
  T *out_, *total_ = nullptr, *normed_ = nullptr;
  float* final_rstd_ = nullptr;
};

// What the last product of a block and the norm of its result give.
template <class T> struct BlockOutput {
  T* out; // [rows, stride of h]
  float* rstd2;
  T* normed2;
};

template <class T, class Visit>
void visit_arrays(BlockOutput<T>& output, const BlockShape& block, int length, const Visit& visit) {
  const long h = BlockStrides(block).h;
  visit(output.out, length * h);
  if (has_result_norm(block)) visit(output.rstd2, length);
  if (keeps_normed(block)) visit(output.normed2, length * h);
}

// The outputs of every layer of pairs whose other activations are recomputed; of the last only where something of it is
// read.  Slot i is that of the i-th such pair.
template <class T> class OutputStore {
public:
  OutputStore(Arena& arena, const Job& job, int slots)
      : block_(job.nets[0].block), slots_(slots), length_(job.length),
        layers_(most_layers(job) - (has_result_norm(block_) || has_final_norm(job) ? 0 : 1)) {
    Arena one(nullptr);
    take(one, 0);
    per_layer_ = one.used();
    first_ = arena.take<char>(static_cast<long>(per_layer_) * layers_);
  }
  int layers() const { return layers_; }
  BlockOutput<T> layer(int index, int slot) const {
    Arena arena(first_ + per_layer_ * static_cast<size_t>(index));
    return take(arena, slot);
  }

private:
  BlockOutput<T> take(Arena& arena, int slot) const {
    BlockOutput<T> output = {};
    visit_arrays(output, block_, length_, TakeSlots{arena, slots_, slot});
    return output;
  }

  const BlockShape& block_;
  int slots_, length_, layers_;
  size_t per_layer_;
  char* first_;
};

template <class T> class GradientStore {
public:
  GradientStore(Arena& arena, const Job& job, int slots, bool in_place)
      : block_(job.nets[0].block), slots_(slots), length_(job.length), in_place_(in_place) {
    Arena one(nullptr);
    take(one, 0);
    per_layer_ = one.used();
    first_ = arena.take<char>(static_cast<long>(per_layer_) * most_layers(job));
    if (has_final_norm(job) && block_.norm_weight)
      final_norm_ = arena.take<float>(static_cast<long>(slots) * BlockStrides(block_).u);
    if (has_injection(job, Injection::linear))
      injection_.dh = arena.take<T>(static_cast<long>(slots) * length_ * BlockStrides(block_).h);
    if (has_injection(job, Injection::diagonal))
      injection_.sums = arena.take<float>(static_cast<long>(slots) * BlockStrides(block_).u);
  }
  // act: the activations of the same slot of the workspace.
  BlockGradients<T> layer(int index, int slot, const BlockActivations<T>& act) const {
    Arena arena(first_ + per_layer_ * static_cast<size_t>(index));
    BlockGradients<T> grads = take(arena, slot);
    if (in_place_) {
      grads.qkv = act.qkv;
      grads.gate_up = act.gate_up;
      grads.sequence_gate_up = act.mlp_t.gate_up;
    }
    return grads;
  }

  // Sums over the sequence for the weight of the final norm, [stride of u]; null: there is none.
  float* final_norm(int slot) const { return final_norm_ ? final_norm_ + slot * BlockStrides(block_).u : nullptr; }
  InjectionGradients<T> injection(int slot) const {
    InjectionGradients<T> grads = injection_;
    if (grads.dh) grads.dh += static_cast<long>(slot) * length_ * BlockStrides(block_).h;
    if (grads.sums) grads.sums += slot * BlockStrides(block_).u;
    return grads;
  }

private:
  BlockGradients<T> take(Arena& arena, int slot) const {
    BlockGradients<T> grads = {};
    visit_arrays(grads, block_, length_, in_place_, TakeSlots{arena, slots_, slot});
    return grads;
  }

  const BlockShape& block_;
  int slots_, length_;
  bool in_place_;
  size_t per_layer_;
  char* first_;
  float* final_norm_ = nullptr;
  InjectionGradients<T> injection_;
};

} // namespace TRMFAST_NAMESPACE
} // namespace trmfast
