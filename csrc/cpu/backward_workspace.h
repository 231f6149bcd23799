// The workspace of a backward pass: what a team needs, and the stores of the pairs whose weight gradients are added up
// at once.
#pragma once

#include "recursion_forward.h"
#include "weight_gradient.h"

namespace trmfast {
namespace TRMFAST_NAMESPACE {

// Memory of one team.
template <class T> struct BackwardBuffers {
  float *u, *dy;
  T* grad_mixed = nullptr;

  BackwardBuffers(Arena& arena, const BlockShape& block, int rows) {
    const BlockStrides strides(block);
    u = arena.take<float>(rows * strides.u);
    dy = arena.take<float>(rows * strides.u);
    if (block.attention) grad_mixed = arena.take<T>(rows * strides.mixed);
  }
};

template <class T> struct BackwardThread {
  BackwardBuffers<T> buffers;
  BlockScratch<T> scratch;
  BlockBackwardScratch<T> backward_scratch;
  WeightGradientScratch<T> gradient_scratch;

  // rows: of the sequences that are taken together
  BackwardThread(Arena& arena, const BlockShape& block, int length, int rows, long gradient_depth)
      : buffers(arena, block, rows), scratch(arena, block, length, rows), backward_scratch(arena, block, length, rows),
        gradient_scratch(arena, gradient_depth, block.attention ? 0 : larger(block.seq_len, block.seq_inner)) {}
};

// Pairs whose weight gradients are added up at once: forward kept the activations of all, or none is read where forward
// left it.  `room` is a whole number of groups, or all pairs that are left.
struct Batch {
  bool kept;
  int first, room;
};

// The workspace; every thread derives the same layout from its address.
template <class T> class BackwardWorkspace {
public:
  const BackwardJob& backward;
  const BlockShape& block;
  const bool recompute; // some pairs
  int layers;
  int group; // slots of a group, see weight_gradient.h; `slots` is a multiple of it, or all there are
  int slots;
  int together; // sequences of a thread that share one pass over the weights
  RopeTables tables;
  ActivationStore<T> kept;        // of forward
  OutputStore<T> outputs;         // of forward too
  ActivationStore<T> activations; // as many slots as `gradients`, none without recomputation
  GradientStore<T> gradients;
  T* panels; // shared: the packed operand of a weight gradient

  BackwardWorkspace(Arena& arena, const BackwardJob& backward)
      : backward(backward), block(backward.job.nets[0].block), recompute(backward.kept.pairs < all_pairs(backward.job)),
        layers(most_layers(backward.job)), group(choose_group(backward)),
        slots(choose_slots(backward, recompute, group)), together(choose_together(backward.job, slots)),
        tables(arena, backward.job),
        kept(of_forward<ActivationStore<T>>(backward.job, backward.kept.activations, backward.kept.pairs)),
        outputs(of_forward<OutputStore<T>>(backward.job, backward.kept.outputs, backward.kept.output_pairs)),
        activations(arena, backward.job, recompute ? slots : 0), gradients(arena, backward.job, slots, recompute),
        panels(arena.take<T>(panels_elements())) {
    Arena one(nullptr);
    lay_out(one);
    per_thread_ = one.used();
    first_ = arena.take<char>(static_cast<long>(per_thread_) * backward.job.threads);
  }

  BackwardThread<T> thread(int index) const {
    Arena arena(first_ + per_thread_ * static_cast<size_t>(index));
    return lay_out(arena);
  }
  int rows() const { return together * backward.job.length; }
  TokenChunks<T> chunks(int used) const {
    return {smaller(group, slots) * backward.job.length, used * backward.job.length};
  }
  // The gradients of a slot; where there is a store of activations, some take the places of those.
  BlockGradients<T> gradient_layer(int index, int slot) const {
    return gradients.layer(index, slot, recompute ? activations.layer(index, slot) : BlockActivations<T>{});
  }
  // The batch that begins with a pair, the first of a group.
  Batch batch(int pair) const {
    const int ahead = backward.kept.pairs - pair;
    if (!recompute) return {true, pair, slots};
    return ahead < group ? Batch{false, pair, slots} : Batch{true, pair, smaller(slots, ahead / group * group)};
  }

private:
  BackwardThread<T> lay_out(Arena& arena) const {
    return BackwardThread<T>(arena, block, backward.job.length, rows(), chunks(slots).depth());
  }
  static int choose_together(const Job& job, int slots) {
    return smaller(sequences_together<T>(job.length), larger(1, smaller(job.batch, slots) / job.threads));
  }
  template <class Store> static Store of_forward(const Job& job, void* memory, int pairs) {
    Arena arena(memory);
    return Store(arena, job, pairs);
  }
  static size_t slot_bytes(const Job& job, bool recompute) {
    Arena arena(nullptr);
    if (recompute) ActivationStore<T>(arena, job, 1);
    GradientStore<T>(arena, job, 1, recompute);
    return arena.used();
  }
  // The most slots, a power of two, that make a chunk of a weight gradient and waste at most a quarter of the store.
  // Depends only on sizes, not on threads or on what forward kept: it determines the order of sums.
  static int choose_group(const BackwardJob& backward) {
    const long fit = static_cast<long>(backward.store_bytes / slot_bytes(backward.job, true));
    int group = 1;
    for (long slots = 2; slots <= fit && slots * backward.job.length <= kGradientChunk; slots *= 2)
      if (fit % slots * 4 <= fit) group = static_cast<int>(slots);
    return group;
  }
  // As many (update, sequence) slots as there are, or as memory allows, then whole groups, and if possible as many for
  // every thread.
  static int choose_slots(const BackwardJob& backward, bool recompute, int group) {
    const Job& job = backward.job;
    const int wanted = all_pairs(job);
    const long fit = static_cast<long>(backward.store_bytes / slot_bytes(job, recompute));
    if (fit >= wanted) return larger(1, wanted);
    int equal = group;
    while (equal % job.threads) equal += group;
    return larger(group, static_cast<int>(fit >= equal ? fit / equal * equal : fit / group * group));
  }
  long panels_elements() const {
    const int widest = larger(larger(block.width, block.inner), HeadLayout(block).output_columns());
    const long by_token = chunks(slots).depth() * round_up(widest, kPanel);
    const long by_sequence =
        block.attention ? 0 : slots * packed_elements<T>(block.width, larger(block.seq_len, block.seq_inner));
    return by_token > by_sequence ? by_token : by_sequence;
  }

  size_t per_thread_;
  char* first_;
};

// Where a pair is: its slot of the workspace, and its activations there or in the kept store.
template <class T> struct Place {
  const BackwardWorkspace<T>& workspace;
  int pair, slot;
  bool kept;

  const ActivationStore<T>& store() const { return kept ? workspace.kept : workspace.activations; }
  int in_store() const { return kept ? pair : slot; }
  BlockActivations<T> activations(int layer) const { return store().layer(layer, in_store()); }
  T* output(int layer, int layers) const { return store().output(layer, layers, in_store()); }
};

} // namespace TRMFAST_NAMESPACE
} // namespace trmfast
