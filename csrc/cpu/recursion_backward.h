// A whole program backward.  The updates are walked in reverse; each one with gradient is computed again from its saved
// input by the forward code (the same values, bit for bit) and differentiated.  What the weight gradients will read
// goes into a store with room for many (update, sequence) slots; when it is full, the gradients of the weights are
// added up over all of it at once, so that the f32 gradients are read and written a few times in all and not once an
// update.
#pragma once

#include "block_backward.h"
#include "recursion_forward.h"
#include "weight_gradient.h"

namespace trmfast {
namespace TRMFAST_NAMESPACE {

// The store of one layer.
template <class T> struct LayerStore {
  BlockActivations<T> act = {};
  BlockGradients<T> grads = {};

  LayerStore(Arena& arena, const BlockShape& block, int slots, int length) {
    const BlockStrides strides(block);
    const long rows = static_cast<long>(slots) * length;
    act.h = arena.take<T>(rows * strides.h);
    act.h1 = arena.take<T>(rows * strides.h);
    act.r2 = arena.take<float>(rows);
    act.gate_up = arena.take<T>(rows * strides.gate_up);
    act.hidden = arena.take<T>(rows * strides.hidden);
    if (block.conv_taps) {
      act.gated = arena.take<T>(rows * strides.hidden);
      grads.dconvolved = arena.take<T>(rows * strides.hidden);
    }
    grads.du1 = arena.take<T>(rows * strides.h);
    grads.du2 = arena.take<T>(rows * strides.h);
    if (block.attention) {
      act.qkv = arena.take<T>(rows * strides.qkv);
      act.attended = arena.take<T>(rows * strides.attended);
      act.r1 = arena.take<float>(rows);
    } else {
      act.sequence_mlp.gate_up = arena.take<T>(2L * slots * block.seq_inner * strides.h);
      act.sequence_mlp.hidden = arena.take<T>(static_cast<long>(slots) * block.seq_inner * strides.h);
      act.sequence_mlp.r = arena.take<float>(slots * strides.u);
    }
  }

  LayerStore at(const BlockShape& block, int slot, int length) const {
    const BlockStrides strides(block);
    const long row = static_cast<long>(slot) * length;
    LayerStore moved = *this;
    moved.act.h += row * strides.h;
    moved.act.h1 += row * strides.h;
    moved.act.r2 += row;
    moved.act.gate_up += row * strides.gate_up;
    moved.act.hidden += row * strides.hidden;
    if (block.conv_taps) {
      moved.act.gated += row * strides.hidden;
      moved.grads.dconvolved += row * strides.hidden;
    }
    moved.grads.du1 += row * strides.h;
    moved.grads.du2 += row * strides.h;
    if (block.attention) {
      moved.act.qkv += row * strides.qkv;
      moved.act.attended += row * strides.attended;
      moved.act.r1 += row;
    } else {
      moved.act.sequence_mlp.gate_up += 2L * slot * block.seq_inner * strides.h;
      moved.act.sequence_mlp.hidden += static_cast<long>(slot) * block.seq_inner * strides.h;
      moved.act.sequence_mlp.r += slot * strides.u;
    }
    return moved;
  }
};

// Where the layers' stores lie: one after the other from `first`.
template <class T> class Store {
public:
  Store(Arena& arena, const BlockShape& block, int layers, int slots, int length)
      : block_(block), slots_(slots), length_(length) {
    Arena one(nullptr);
    LayerStore<T>(one, block, slots, length);
    per_layer_ = one.used();
    first_ = arena.take<char>(static_cast<long>(per_layer_) * layers);
  }
  LayerStore<T> layer(int index) const {
    Arena arena(first_ + per_layer_ * static_cast<size_t>(index));
    return LayerStore<T>(arena, block_, slots_, length_);
  }
  static size_t slot_bytes(const BlockShape& block, int layers, int length) {
    Arena arena(nullptr);
    LayerStore<T>(arena, block, 1, length);
    return arena.used() * static_cast<size_t>(layers);
  }

private:
  const BlockShape& block_;
  int slots_, length_;
  size_t per_layer_;
  char* first_;
};

// Memory of one team.
template <class T> struct BackwardBuffers {
  float *u, *dy;
  T* out; // of the last layer
  T* grad_attended = nullptr;

  BackwardBuffers(Arena& arena, const BlockShape& block, int rows) {
    const BlockStrides strides(block);
    u = arena.take<float>(rows * strides.u);
    dy = arena.take<float>(rows * strides.u);
    out = arena.take<T>(rows * strides.h);
    if (block.attention) grad_attended = arena.take<T>(rows * strides.attended);
  }
};

template <class T> struct BackwardThread {
  BackwardBuffers<T> buffers;
  BlockScratch<T> scratch;
  BlockBackwardScratch<T> backward_scratch;
  WeightGradientScratch<T> gradient_scratch;

  BackwardThread(Arena& arena, const BlockShape& block, int length, long gradient_depth)
      : buffers(arena, block, length), scratch(arena, block, length), backward_scratch(arena, block, length),
        gradient_scratch(arena, gradient_depth) {}
};

// Everything in the workspace, laid out again from its address by every thread.
template <class T> class BackwardWorkspace {
public:
  const BackwardJob& backward;
  const BlockShape& block;
  int layers, slots;
  RopeTables tables;
  Store<T> store;
  T* panels; // shared: the packed operand of a weight gradient

  BackwardWorkspace(Arena& arena, const BackwardJob& backward)
      : backward(backward), block(backward.job.nets[0].block), layers(most_layers(backward.job)),
        slots(choose_slots(backward, layers)), tables(arena, backward.job),
        store(arena, block, layers, slots, backward.job.length), panels(arena.take<T>(panels_elements())) {
    Arena one(nullptr);
    BackwardThread<T>(one, block, backward.job.length, tokens());
    per_thread_ = one.used();
    first_ = arena.take<char>(static_cast<long>(per_thread_) * backward.job.threads);
  }

  BackwardThread<T> thread(int index) const {
    Arena arena(first_ + per_thread_ * static_cast<size_t>(index));
    return BackwardThread<T>(arena, block, backward.job.length, tokens());
  }

private:
  static int most_layers(const Job& job) {
    int most = 0;
    for (int n = 0; n < job.num_nets; ++n) most = larger(most, job.nets[n].layers);
    return most;
  }
  // As many (update, sequence) slots as there are, or as memory allows, then a multiple of the threads.
  static int choose_slots(const BackwardJob& backward, int layers) {
    const Job& job = backward.job;
    long wanted = 0;
    for (int i = 0; i < job.program.num_updates; ++i) wanted += job.program.updates[i].grad;
    wanted *= job.batch;
    const long fit =
        static_cast<long>(backward.store_bytes / Store<T>::slot_bytes(job.nets[0].block, layers, job.length));
    if (fit >= wanted) return larger(1, static_cast<int>(wanted));
    return larger(1, static_cast<int>(fit >= job.threads ? fit / job.threads * job.threads : fit));
  }
  long tokens() const { return static_cast<long>(slots) * backward.job.length; }
  long panels_elements() const {
    const int widest = larger(larger(block.width, block.inner), HeadLayout(block).output_columns());
    const long by_token = packed_elements<T>(static_cast<int>(tokens()), widest);
    const long by_sequence =
        block.attention ? 0 : slots * packed_elements<T>(block.width, larger(block.seq_len, block.seq_inner));
    return by_token > by_sequence ? by_token : by_sequence;
  }

  size_t per_thread_;
  char* first_;
};

// One (update, sequence) in one slot: h from `saved`, dy from the gradient of dst; dh is added to the sources and to x.
template <class T>
void slot_backward(const BackwardWorkspace<T>& workspace, const Team& team, const Update& update, const T* saved,
                   int sequence, int slot, const BackwardThread<T>& shared, const BackwardThread<T>& mine) {
  const BackwardJob& backward = workspace.backward;
  const Job& job = backward.job;
  const NetShape& net = job.nets[update.net];
  const BlockShape& block = net.block;
  const BlockStrides strides(block);
  const Rope rope = workspace.tables.rope(job);
  const int L = job.length, D = job.width;
  const long first = static_cast<long>(sequence) * L * D;
  const auto layer_store = [&](int layer) { return workspace.store.layer(layer).at(block, slot, L); };
  const Range rows = team.split(L);

  T* h = layer_store(0).act.h;
  for (int t = rows.begin; t < rows.end; ++t)
    __builtin_memcpy(h + t * strides.h, saved + first + static_cast<long>(t) * D, sizeof(T) * static_cast<size_t>(D));
  team.sync();
  Arena forward_weights(const_cast<void*>(job.packed[update.net].forward));
  for (int layer = 0; layer < net.layers; ++layer) {
    T* out = layer + 1 < net.layers ? layer_store(layer + 1).act.h : shared.buffers.out;
    block_forward(team, block, ForwardWeights<T>(forward_weights, block), rope, 1, L, layer_store(layer).act,
                  shared.buffers.u, out, strides.h, mine.scratch);
  }

  float* dy = shared.buffers.dy;
  float* dst = backward.grad_states[update.dst] + first;
  for (int t = rows.begin; t < rows.end; ++t) {
    __builtin_memcpy(dy + t * strides.u, dst + static_cast<long>(t) * D, sizeof(float) * static_cast<size_t>(D));
    __builtin_memset(dst + static_cast<long>(t) * D, 0, sizeof(float) * static_cast<size_t>(D));
  }
  team.sync();
  for (int layer = net.layers - 1; layer >= 0; --layer) {
    Arena weights(const_cast<void*>(job.packed[update.net].backward));
    for (int before = 0; before < layer; ++before) BackwardWeights<T>(weights, block);
    const T* out = layer + 1 < net.layers ? layer_store(layer + 1).act.h : shared.buffers.out;
    const LayerStore<T> here = layer_store(layer);
    block_backward(team, block, BackwardWeights<T>(weights, block), rope, 1, L, here.act, out, dy, here.grads,
                   shared.buffers.grad_attended, mine.backward_scratch);
  }
  const auto add = [&](float* to) {
    for (int t = rows.begin; t < rows.end; ++t)
      for (int j = 0; j < D; j += kLanes) {
        const int n = smaller(kLanes, D - j);
        float* at = to + first + static_cast<long>(t) * D + j;
        store(at, load(at, n) + load(dy + t * strides.u + j), n);
      }
  };
  for (int s = 0; s < update.num_sources; ++s) add(backward.grad_states[job.program.sources[update.first_source + s]]);
  if (update.inject_x && backward.grad_x) add(backward.grad_x);
  team.sync(); // before the buffers are used again
}

// Adds what `used` slots hold to the gradients of net `n`; the first time, stores it.
template <class T>
void store_weight_gradients(const BackwardWorkspace<T>& workspace, const Team& all, int n, int used, bool fresh,
                            const BackwardThread<T>& mine) {
  const Job& job = workspace.backward.job;
  const BlockShape& block = workspace.block;
  const BlockStrides strides(block);
  const HeadLayout heads(block);
  const GateLayout gates{block.inner};
  const int D = block.width, tokens = used * job.length;
  float* const* grads = workspace.backward.grad_weights;
  for (int before = 0; before < n; ++before) grads += job.nets[before].layers * block_weights(block);
  const auto same = [](int row) { return row; };
  for (int layer = 0; layer < job.nets[n].layers; ++layer, grads += block_weights(block)) {
    const LayerStore<T> here = workspace.store.layer(layer);
    const BlockActivations<T>& act = here.act;
    const auto by_token = [&](const T* dy, long dy_stride, int outputs, const T* x, long x_stride, int inputs,
                              float* grad, auto row_of) {
      if (grad)
        weight_gradient(all, dy, dy_stride, outputs, x, x_stride, inputs, tokens, {grad, fresh}, workspace.panels,
                        mine.gradient_scratch, row_of);
    };
    const auto by_sequence = [&](const T* dy, int outputs, const T* x, int inputs, float* grad) {
      if (grad)
        sequence_weight_gradient(all, dy, outputs, x, inputs, strides.h, D, used, {grad, fresh}, workspace.panels,
                                 mine.gradient_scratch);
    };
    if (block.attention) {
      by_token(act.qkv, strides.qkv, heads.columns(), act.h, strides.h, D, grads[0],
               [&](int c) { return heads.qkv_row(c); });
      by_token(here.grads.du1, strides.h, D, act.attended, strides.attended, heads.output_columns(), grads[1], same);
    } else {
      by_sequence(act.sequence_mlp.gate_up, 2 * block.seq_inner, act.h, block.seq_len, grads[0]);
      by_sequence(here.grads.du1, block.seq_len, act.sequence_mlp.hidden, block.seq_inner, grads[1]);
    }
    by_token(act.gate_up, strides.gate_up, gates.columns(), act.h1, strides.h, D, grads[2],
             [&](int c) { return gates.row(c); });
    if (block.conv_taps && (grads[3] || grads[4]))
      conv_gradient(all, block, here.grads.dconvolved, act.gated, strides.hidden, used, job.length, {grads[3], fresh},
                    {grads[4], fresh});
    by_token(here.grads.du2, strides.h, D, act.hidden, strides.hidden, block.inner, grads[block_weights(block) - 1],
             same);
  }
}

template <class T> size_t backward_bytes(const BackwardJob& job) {
  Arena arena(nullptr);
  BackwardWorkspace<T> workspace(arena, job);
  return arena.used();
}

// Running gradients of the states from the gradients of the outputs; zero for x; padding of the store.
template <class T> void start_backward(const BackwardWorkspace<T>& workspace, const Team& all,
                                       const BackwardThread<T>& mine) {
  const BackwardJob& backward = workspace.backward;
  const Job& job = backward.job;
  const BlockShape& block = workspace.block;
  const BlockStrides strides(block);
  const Range rows = all.split(job.batch * job.length);
  for (long at = static_cast<long>(rows.begin) * job.width; at < static_cast<long>(rows.end) * job.width; ++at) {
    for (int s = 0; s < job.program.num_states; ++s) {
      const T* from = static_cast<const T*>(backward.grad_states_out[s]);
      backward.grad_states[s][at] = from ? to_float(from[at]) : 0.0f;
    }
    if (backward.grad_x) backward.grad_x[at] = 0.0f;
  }
  const Range slots = all.split(workspace.slots);
  const int count = (slots.end - slots.begin) * job.length, padded = round_up(block.width, kPanel);
  for (int layer = 0; layer < workspace.layers; ++layer) {
    const LayerStore<T> here = workspace.store.layer(layer).at(block, slots.begin, job.length);
    clear_activation_padding(block, count, here.act);
    clear_padding(here.grads.du1, count, block.width, padded, strides.h);
    clear_padding(here.grads.du2, count, block.width, padded, strides.h);
  }
  const int attended = HeadLayout(block).output_columns();
  clear_padding(mine.buffers.out, job.length, block.width, padded, strides.h);
  clear_padding(mine.buffers.dy, job.length, block.width, strides.u, strides.u);
  if (block.attention)
    clear_padding(mine.buffers.grad_attended, job.length, attended, strides.attended, strides.attended);
  workspace.tables.pack(job, all);
  all.sync();
}

template <class T> void backward(const BackwardJob& backward, void* memory, int thread) {
  const Job& job = backward.job;
  Arena arena(memory);
  const BackwardWorkspace<T> workspace(arena, backward);
  const Team all = everyone(job, thread);
  const BackwardThread<T> mine = workspace.thread(thread);
  start_backward(workspace, all, mine);

  const long elements = static_cast<long>(job.batch) * job.length * job.width;
  const T* saved = static_cast<const T*>(backward.saved);
  for (int i = 0; i < job.program.num_updates; ++i) saved += job.program.updates[i].grad ? elements : 0;
  bool zero[kMostStates] = {}, summed[kMostNets] = {};
  int used = 0, net = 0;
  const auto add_up = [&] {
    store_weight_gradients(workspace, all, net, used, !summed[net], mine);
    summed[net] = true;
    used = 0;
  };
  for (int i = job.program.num_updates - 1; i >= 0; --i) {
    const Update& update = job.program.updates[i];
    if (!update.grad) { // cuts the graph
      if (!zero[update.dst]) {
        const Range rows = all.split(job.batch * job.length);
        __builtin_memset(backward.grad_states[update.dst] + static_cast<long>(rows.begin) * job.width, 0,
                         sizeof(float) * static_cast<size_t>(rows.end - rows.begin) * static_cast<size_t>(job.width));
        all.sync();
      }
      zero[update.dst] = true;
      continue;
    }
    saved -= elements;
    for (int s = 0; s < update.num_sources; ++s) zero[job.program.sources[update.first_source + s]] = false;
    for (int sequence = 0; sequence < job.batch;) {
      if (used == workspace.slots || (used > 0 && net != update.net)) add_up();
      net = update.net;
      const int wave = smaller(job.batch - sequence, workspace.slots - used);
      const Division division(wave, job.threads);
      for (int k = 0; k < division.each; ++k) {
        const int index = thread * division.each + k;
        slot_backward(workspace, kAlone, update, saved, sequence + index, used + index, mine, mine);
      }
      const RestTeam rest(job, division, thread);
      if (!rest.idle) {
        const int index = division.each * job.threads + rest.index;
        rest.team.sync(); // the first thread, whose buffers the team uses, is done with its own sequences
        slot_backward(workspace, rest.team, update, saved, sequence + index, used + index,
                      workspace.thread(rest.first_thread), mine);
      }
      all.sync();
      used += wave;
      sequence += wave;
    }
  }
  if (used > 0) add_up();
  Dot<T>::release();
}

} // namespace TRMFAST_NAMESPACE
} // namespace trmfast
