// A whole program forward.  A team takes a few sequences through every update before it takes the next: their
// activations stay in L2, the weights stream past, and no thread waits for another team.
#pragma once

#include "store.h"

namespace trmfast {
namespace TRMFAST_NAMESPACE {

// Sequences that share one pass over the weights.  With AMX, about 400 rows per panel hide the fetch of the next
// panel from L3; vector units need far fewer.
template <class T> int sequences_together(int length) {
  const int rows = Dot<T>::kRows >= 32 ? 400 : 112;
  return larger(1, rows / larger(1, length));
}

// Packed rotation tables, shared by all threads.
struct RopeTables {
  float *cos = nullptr, *sin = nullptr;

  RopeTables(Arena& arena, const Job& job) {
    const BlockShape& block = job.nets[0].block;
    if (!job.cos || !block.attention) return;
    const long elements = static_cast<long>(job.length) * HeadLayout(block).qk_width;
    cos = arena.take<float>(elements);
    sin = arena.take<float>(elements);
  }
  void pack(const Job& job, const Team& all) const {
    if (!cos) return;
    const HeadLayout heads(job.nets[0].block);
    const Range range = all.split(job.length);
    const long from = static_cast<long>(range.begin) * heads.head_dim,
               to = static_cast<long>(range.begin) * heads.qk_width;
    pack_rope_table(job.cos + from, heads, range.end - range.begin, cos + to);
    pack_rope_table(job.sin + from, heads, range.end - range.begin, sin + to);
  }
  Rope rope(const Job& job) const { return {cos, sin, HeadLayout(job.nets[0].block).qk_width}; }
};

// Memory of one team for inference: the activations of one block, reused by every block.  To leave L2 to the
// weights, activation reuses the memory of qkv after its last read; h1 is h, unless the sum is normed: then it reuses
// that of mixed.
template <class T> struct ForwardBuffers {
  BlockActivations<T> act = {};
  T* total = nullptr; // the sum of the sources, where an injection weighs it; dead before qkv is written
  float* u = nullptr;

  ForwardBuffers(Arena& arena, const BlockShape& block, int rows, bool injects = false) {
    const BlockStrides strides(block);
    const bool reuse = block.attention && !has_padding(block);
    act.h = arena.take<T>(rows * strides.h);
    if (block.attention) {
      act.mixed = arena.take<T>(rows * (reuse ? larger(strides.mixed, strides.h) : strides.mixed));
      act.qkv = arena.take<T>(rows * (reuse ? larger(strides.qkv, strides.activation) : strides.qkv));
    }
    act.h1 = !block.sum_norm ? act.h : reuse ? act.mixed : arena.take<T>(rows * strides.h);
    act.activation = reuse ? act.qkv : arena.take<T>(rows * strides.activation);
    if (block.conv_taps) act.convolved = arena.take<T>(rows * strides.activation);
    if (block.input_norm) act.input_rstd1 = act.input_rstd2 = arena.take<float>(rows);
    if (injects) total = reuse && strides.qkv >= strides.h ? act.qkv : arena.take<T>(rows * strides.h);
    if (has_result_norm(block)) u = arena.take<float>(rows * strides.u);
  }
};

// The type of states, x and activations where T is that of the operands of products.
template <class T> struct StateElement {
  using Type = T;
};
template <> struct StateElement<int8_t> {
  using Type = bf16;
};

template <class T> struct ForwardWorkspace {
  RopeTables tables;
  char* first; // of thread 0
  size_t per_thread;
  int together;

  ForwardWorkspace(Arena& arena, const ForwardJob& forward) : tables(arena, forward.job) {
    const Job& job = forward.job;
    together = smaller(sequences_together<T>(job.length), larger(1, job.batch / job.threads));
    Arena one(nullptr);
    layout(one, job);
    per_thread = one.used();
    first = arena.take<char>(static_cast<long>(per_thread) * job.threads);
  }
  struct Thread {
    ForwardBuffers<T> buffers;
    BlockScratch<T> scratch;
  };
  Thread layout(Arena& arena, const Job& job) const {
    const BlockShape& block = job.nets[0].block;
    ForwardBuffers<T> buffers(arena, block, together * job.length, has_injection_weight(job));
    return {buffers, BlockScratch<T>(arena, block, job.length, together * job.length)};
  }
  Thread thread(const Job& job, int index) const {
    Arena arena(first + per_thread * static_cast<size_t>(index));
    return layout(arena, job);
  }
};

// h[row] <- sum of the sources (+ x), in f32, rounded once; also copied to `saved` if backward needs it.
template <class T>
void sum_sources(const Team& team, const Job& job, const Update& update, const T* const* states, const T* x,
                 long first_row, int rows, T* h, long stride, T* saved) {
  const int D = job.width;
  const Range range = team.split(rows);
  for (int t = range.begin; t < range.end; ++t) {
    const long at = (first_row + t) * D;
    for (int j = 0; j < D; j += kLanes) {
      const int n = smaller(kLanes, D - j);
      vf sum = update.inject_x ? load(x + at + j, n) : vf{};
      for (int s = 0; s < update.num_sources; ++s)
        sum += load(states[job.program.sources[update.first_source + s]] + at + j, n);
      store(h + t * stride + j, sum, n);
      if (saved) store(saved + at + j, sum, n);
    }
  }
}

// Copies the D channels of each row.
template <class T>
void copy_rows(const Team& team, int rows, int D, const T* from, long from_stride, T* to, long to_stride) {
  const Range range = team.split(rows);
  for (int t = range.begin; t < range.end; ++t)
    __builtin_memcpy(to + t * to_stride, from + t * from_stride, sizeof(T) * static_cast<size_t>(D));
}

// out <- the final norm of a net of `rows` tokens from h, the output of its last block.  weight, normed (without it)
// and rstd may be null.
template <class T>
void norm_net(const Team& team, const BlockShape& block, int rows, const T* h, const float* weight, T* normed,
              float* rstd, T* out, long out_stride) {
  team.begin("final norm");
  const long stride = BlockStrides(block).h;
  const Range range = team.split(rows);
  for (int t = range.begin; t < range.end; ++t) {
    const float r = rms_norm<T, T>(h + t * stride, block.width, block.eps, weight, nullptr,
                                   normed ? normed + t * stride : nullptr, out + t * out_stride);
    if (rstd) rstd[t] = r;
  }
  team.sync();
}

// The layers of a net for one update; h is act.h, the result goes to out, and the output of each block to a slot of
// `kept` too, unless that is null.
template <class T>
void net_forward(const Team& team, const NetShape& net, const void* packed, const Positions& positions, int sequences,
                 int length, BlockActivations<T> act, float* u, T* out, long out_stride, const OutputStore<T>* kept,
                 int slot, const BlockScratch<T>& scratch) {
  Arena weights(const_cast<void*>(packed));
  const long stride = BlockStrides(net.block).h;
  for (int layer = 0; layer < net.layers; ++layer) {
    const bool last = layer + 1 == net.layers && !net.final_norm;
    const bool keep = kept && layer < kept->layers();
    const BlockOutput<T> output = keep ? kept->layer(layer, slot) : BlockOutput<T>{};
    act.rstd2 = output.rstd2;
    act.normed2 = output.normed2;
    // h is dead once h1 is computed, so a block may overwrite its input.
    T* to = last ? out : act.h;
    const long to_stride = last ? out_stride : stride;
    block_forward(team, net.block, ForwardWeights<T>(weights, net.block), positions, sequences, length, act, u, to,
                  to_stride, scratch);
    if (!keep) continue;
    team.begin("copy of the output");
    copy_rows(team, sequences * length, net.block.width, to, to_stride, output.out, stride);
    team.sync();
  }
  if (net.final_norm)
    norm_net<T>(team, net.block, sequences * length, act.h, take_final_norm(weights, net), nullptr, nullptr, out,
                out_stride);
}

// An update whose activations are kept: each layer computes into the store, and the result goes to out too.
template <class T>
void net_forward_kept(const Team& team, const NetShape& net, const void* packed, const Positions& positions,
                      int sequences, int length, const ActivationStore<T>& store, int slot, float* u, T* out,
                      const BlockScratch<T>& scratch) {
  Arena weights(const_cast<void*>(packed));
  const long stride = BlockStrides(net.block).h;
  const int D = net.block.width;
  for (int layer = 0; layer < net.layers; ++layer)
    block_forward(team, net.block, ForwardWeights<T>(weights, net.block), positions, sequences, length,
                  store.layer(layer, slot), u, store.output(layer, net.layers, slot), stride, scratch);
  if (net.final_norm) {
    norm_net(team, net.block, sequences * length, store.out(slot), take_final_norm(weights, net), store.normed(slot),
             store.final_rstd(slot), out, D);
    return;
  }
  team.begin("copy of the output");
  copy_rows(team, sequences * length, D, store.out(slot), stride, out, D);
  team.sync();
}

template <class T>
void program_forward(const ForwardJob& forward, const Team& team, const Rope& rope, int first_sequence, int sequences,
                     const ForwardBuffers<T>& buffers, const BlockScratch<T>& scratch, const T** states) {
  const Job& job = forward.job;
  const long first_row = static_cast<long>(first_sequence) * job.length,
             elements = static_cast<long>(job.batch) * job.length * job.width;
  const Positions positions = Positions{rope, job.segments}.of(first_sequence, job.length);
  Arena activations(forward.kept.activations), outputs(forward.kept.outputs);
  const ActivationStore<T> store(activations, job, forward.kept.pairs);
  const OutputStore<T> output_store(outputs, job, forward.kept.output_pairs);
  int pair = all_pairs(job) + first_sequence;
  for (int s = 0; s < job.program.num_states; ++s) states[s] = static_cast<const T*>(forward.states_in[s]);
  T* saved = static_cast<T*>(forward.saved);
  for (int i = 0; i < job.program.num_updates; ++i) {
    const Update& update = job.program.updates[i];
    const NetShape& net = job.nets[update.net];
    const void* packed = job.packed[update.net].forward;
    if (update.grad) pair -= job.batch;
    const KeptPart kept(forward.kept, pair, update.grad ? sequences : 0);
    const bool save = saved && update.grad && pair - first_sequence + job.batch > forward.kept.pairs;
    const bool injects = net.injection != Injection::add;
    Update sources = update;
    if (injects) sources.inject_x = false;
    const T* x = update.inject_x ? static_cast<const T*>(forward.x) : nullptr;
    T* out = static_cast<T*>(forward.states_out[update.dst]);
    // Some of the sequences: h <- the input of the net, `total` first where an injection weighs it.  False: stop.
    const auto enter = [&](long row, int rows, T* h, T* total) {
      team.begin("sum of the sources");
      sum_sources(team, job, sources, states, x, row, rows, injects ? total : h, BlockStrides(net.block).h,
                  save ? saved : nullptr);
      if (!team.sync()) return false;
      if (injects)
        inject(team, net, injection_weights<T, ForwardWeights<T>>(net, packed), update.num_sources > 0, total,
               x ? x + row * job.width : nullptr, rows, h, scratch.tile);
      return true;
    };
    const auto in_buffers = [&](int first, int count, const OutputStore<T>* outputs) {
      const long row = first_row + static_cast<long>(first) * job.length;
      if (!enter(row, count * job.length, buffers.act.h, buffers.total)) return false;
      net_forward(team, net, packed, positions.of(first, job.length), count, job.length, buffers.act, buffers.u,
                  out + row * job.width, job.width, outputs, kept.slot, scratch);
      return true;
    };
    // The first sequences are kept, the next ones with the outputs of their blocks, the others not at all.
    if (kept.whole) {
      if (!enter(first_row, kept.whole * job.length, store.layer(0, pair).h, store.total(pair))) return;
      net_forward_kept(team, net, packed, positions, kept.whole, job.length, store, pair, buffers.u,
                       out + first_row * job.width, scratch);
    }
    if (kept.with_outputs && !in_buffers(kept.whole, kept.with_outputs, &output_store)) return;
    const int others = sequences - kept.whole - kept.with_outputs;
    if (others && !in_buffers(sequences - others, others, nullptr)) return;
    if (save) saved += elements;
    states[update.dst] = static_cast<const T*>(forward.states_out[update.dst]);
  }
}

template <class T> size_t kept_bytes(const Job& job, int pairs) {
  Arena arena(nullptr);
  ActivationStore<T>(arena, job, pairs);
  return arena.used();
}

template <class T> size_t output_bytes(const Job& job, int pairs) {
  Arena arena(nullptr);
  OutputStore<T>(arena, job, pairs);
  return arena.used();
}

template <class T> size_t forward_bytes(const ForwardJob& job) {
  Arena arena(nullptr);
  ForwardWorkspace<T> workspace(arena, job);
  return arena.used();
}

template <class T> void forward(const ForwardJob& forward, void* memory, int thread) {
  const Job& job = forward.job;
  constexpr bool keeps = sizeof(T) > 1; // int8 is for inference
  Arena arena(memory);
  const ForwardWorkspace<T> workspace(arena, forward);
  const Team all = everyone(job, thread);
  all.begin("start");
  workspace.tables.pack(job, all);
  if constexpr (keeps) {
    if (const int pairs = forward.kept.pairs) {
      Arena kept(forward.kept.activations);
      ActivationStore<T>(kept, job, pairs).clear_padding(most_layers(job), all.split(pairs));
    }
  }
  if (workspace.tables.cos || forward.kept.pairs) all.sync();
  const Rope rope = workspace.tables.rope(job);
  const Division division(job.batch, job.threads);
  const typename StateElement<T>::Type* states[kMostStates];

  const auto mine = workspace.thread(job, thread);
  const BlockShape& block = job.nets[0].block;
  clear_activation_padding(block, workspace.together * job.length, mine.buffers.act);
  clear_padding(mine.buffers.total, workspace.together * job.length, block.width, round_up(block.width, kPanel),
                BlockStrides(block).h);
  for (int done = 0; done < division.each; done += workspace.together)
    program_forward(forward, alone(job, thread), rope, thread * division.each + done,
                    smaller(workspace.together, division.each - done), mine.buffers, mine.scratch, states);

  // The rest: a team to a sequence, in the buffers of its first thread.
  const RestTeam rest(job, division, thread);
  if (!rest.idle) {
    const auto shared = workspace.thread(job, rest.first_thread);
    rest.team.sync(); // the first thread is done with its own sequences
    program_forward(forward, rest.team, rope, division.each * job.threads + rest.index, 1, shared.buffers, mine.scratch,
                    states);
  }
  Dot<T>::release();
}

} // namespace TRMFAST_NAMESPACE
} // namespace trmfast
