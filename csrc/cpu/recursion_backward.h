// A whole program backward.  The updates are walked in reverse; the forward code recomputes each update with gradient
// from its saved input (bit for bit), but for what forward kept; the update is then differentiated.  The
// operands of weight gradients go into a store with room for many (update, sequence) slots.  When it is full, all
// weight gradients are accumulated over it at once, so the f32 gradients are read and written a few times in all, not
// once per update.  The timing changes no bit: see weight_gradient.h.
#pragma once

#include "backward_workspace.h"
#include "small_gradient.h"

namespace trmfast {
namespace TRMFAST_NAMESPACE {

// The output of a block and what the norm of its result gave <- those that forward kept, from slot `from` on.
template <class T>
void copy_output(const BackwardWorkspace<T>& workspace, const Team& team, int layer, int layers, int rows, int from,
                 int slot) {
  const BlockShape& block = workspace.block;
  const long stride = BlockStrides(block).h;
  const BlockOutput<T> output = workspace.outputs.layer(layer, from);
  const BlockActivations<T> act = workspace.activations.layer(layer, slot);
  team.begin("copy of the output");
  copy_rows(team, rows, block.width, output.out, stride, workspace.activations.output(layer, layers, slot), stride);
  if (output.normed2) copy_rows(team, rows, block.width, output.normed2, stride, act.normed2, stride);
  if (output.rstd2 && team.rank == 0)
    __builtin_memcpy(act.rstd2, output.rstd2, sizeof(float) * static_cast<size_t>(rows));
  team.sync();
}

// Recomputes an update's activations for consecutive sequences from their saved inputs, and from their x where an
// injection has a weight; null: the update does not inject it.  outputs: where forward kept the outputs of the blocks,
// the slot; -1: it did not.
template <class T>
void slot_forward(const BackwardWorkspace<T>& workspace, const Team& team, const Update& update, const T* saved,
                  const T* x, const Positions& positions, int sequences, int slot, int outputs,
                  const BackwardThread<T>& shared, const BackwardThread<T>& mine) {
  const Job& job = workspace.backward.job;
  const NetShape& net = job.nets[update.net];
  const BlockStrides strides(net.block);
  const int L = job.length, D = job.width;
  const int rows = sequences * L;
  const void* packed = job.packed[update.net].forward;
  T* h = workspace.activations.layer(0, slot).h;
  T* to = net.injection == Injection::add ? h : workspace.activations.total(slot);
  team.begin("saved input");
  copy_rows(team, rows, D, saved, D, to, strides.h);
  team.sync();
  if (net.injection != Injection::add)
    inject(team, net, injection_weights<T, ForwardWeights<T>>(net, packed), update.num_sources > 0, to, x, rows, h,
           mine.scratch.tile);
  Arena weights(const_cast<void*>(packed));
  for (int layer = 0; layer < net.layers; ++layer) {
    // Nobody reads the last output where no norm follows the last product.
    const bool read = layer + 1 < net.layers || has_result_norm(net.block) || net.final_norm;
    if (read && outputs >= 0) copy_output(workspace, team, layer, net.layers, rows, outputs, slot);
    block_forward(team, net.block, ForwardWeights<T>(weights, net.block), positions, sequences, L,
                  workspace.activations.layer(layer, slot), shared.buffers.u,
                  read && outputs < 0 ? workspace.activations.output(layer, net.layers, slot) : nullptr, strides.h,
                  mine.scratch);
  }
  if (net.final_norm)
    norm_net<T>(team, net.block, rows, workspace.activations.out(slot), nullptr, nullptr,
                workspace.activations.final_rstd(slot), workspace.activations.normed(slot), strides.h);
}

// dy <- gradient of a net's last block from that of its final norm, whose plain output is y, rstd r.
template <class T>
void final_norm_backward(const Team& team, const BlockShape& block, int sequences, int length, const float* weight,
                         const T* y, const float* r, float* dy, float* grad_weight) {
  const BlockStrides strides(block);
  team.begin("final norm backward");
  if (grad_weight) {
    norm_weight_gradient(team, block, sequences, length, dy, y, grad_weight);
    team.sync();
  }
  const Range rows = team.split(sequences * length);
  for (int t = rows.begin; t < rows.end; ++t) {
    if (weight) weigh_row(dy + t * strides.u, weight, block.width, dy + t * strides.u);
    rms_norm_backward<T>(dy + t * strides.u, y + t * strides.h, r[t], block.width, block.eps, nullptr);
  }
  team.sync();
}

// An update of consecutive sequences, the first at `place`: h from `saved`, dy from the gradient of dst; the gradients
// of the sources and of x are added to theirs.
template <class T>
void slot_backward(const BackwardWorkspace<T>& workspace, const Team& team, const Update& update, const T* saved,
                   int sequence, int sequences, const Place<T>& place, const BackwardThread<T>& shared,
                   const BackwardThread<T>& mine) {
  const BackwardJob& backward = workspace.backward;
  const Job& job = backward.job;
  const NetShape& net = job.nets[update.net];
  const BlockShape& block = net.block;
  const BlockStrides strides(block);
  const int L = job.length, D = job.width;
  const long first = static_cast<long>(sequence) * L * D;
  const Range rows = team.split(sequences * L);
  const Positions positions = Positions{workspace.tables.rope(job), job.segments}.of(sequence, L);
  if (!place.kept) {
    const KeptPart kept(backward.kept, place.pair, sequences);
    if (kept.whole) team.begin("copy of kept activations");
    for (int s = 0; s < kept.whole; ++s)
      workspace.activations.copy(team, net.layers, workspace.kept, place.pair + s, place.slot + s);
    if (kept.whole) team.sync();
    const auto recompute = [&](int from, int count, int outputs) {
      if (!count) return;
      const long at = first + static_cast<long>(from) * L * D;
      const T* x = backward.x && update.inject_x ? static_cast<const T*>(backward.x) + at : nullptr;
      slot_forward(workspace, team, update, saved + at, x, positions.of(from, L), count, place.slot + from, outputs,
                   shared, mine);
    };
    recompute(kept.whole, kept.with_outputs, kept.slot);
    recompute(kept.whole + kept.with_outputs, sequences - kept.whole - kept.with_outputs, -1);
  }

  team.begin("gradient of the output");
  const RunningGradient running = {shared.buffers.dy, shared.buffers.u};
  float* dy = running.dy;
  float* dst = backward.grad_states[update.dst] + first;
  for (int t = rows.begin; t < rows.end; ++t) {
    __builtin_memcpy(dy + t * strides.u, dst + static_cast<long>(t) * D, sizeof(float) * static_cast<size_t>(D));
    __builtin_memset(dst + static_cast<long>(t) * D, 0, sizeof(float) * static_cast<size_t>(D));
  }
  team.sync();
  const void* packed = job.packed[update.net].backward;
  if (net.final_norm)
    final_norm_backward(team, block, sequences, L, final_norm_weight<BackwardWeights<T>>(net, packed),
                        place.store().normed(place.in_store()), place.store().final_rstd(place.in_store()), dy,
                        workspace.gradients.final_norm(place.slot));
  for (int layer = net.layers - 1; layer >= 0; --layer) {
    block_backward(team, block, layer_weights<BackwardWeights<T>>(net, packed, layer), positions, sequences, L,
                   place.activations(layer), place.output(layer, net.layers), running,
                   workspace.gradient_layer(layer, place.slot), shared.buffers.grad_mixed, mine.backward_scratch);
  }
  team.begin("gradients of the sources");
  const auto add = [&](float* to) {
    for (int t = rows.begin; t < rows.end; ++t)
      for (int j = 0; j < D; j += kLanes) {
        const int n = smaller(kLanes, D - j);
        float* at = to + first + static_cast<long>(t) * D + j;
        store(at, load(at, n) + load(dy + t * strides.u + j), n);
      }
  };
  const int* sources = job.program.sources + update.first_source;
  if (update.inject_x && backward.grad_x) add(backward.grad_x);
  if (net.injection == Injection::add)
    for (int s = 0; s < update.num_sources; ++s) add(backward.grad_states[sources[s]]);
  else
    injection_backward(team, net, injection_weights<T, BackwardWeights<T>>(net, packed), update.num_sources > 0,
                       sequences, L, place.store().total(place.in_store()), dy,
                       workspace.gradients.injection(place.slot), mine.backward_scratch.tile,
                       [&](int t, int c, int lanes, vf values) {
                         for (int s = 0; s < update.num_sources; ++s) {
                           float* at = backward.grad_states[sources[s]] + first + static_cast<long>(t) * D + c;
                           store_lanes(at, load_lanes(at, lanes) + values, lanes);
                         }
                       });
  team.sync(); // before the buffers are used again
}

// Accumulates `used` pairs, `first` and those after it, into the gradients of net `n`; the first time, stores them.
template <class T>
void store_weight_gradients(const BackwardWorkspace<T>& workspace, const Team& all, int n, const Place<T>& first,
                            int used, bool fresh, const BackwardThread<T>& mine) {
  const Job& job = workspace.backward.job;
  const BlockShape& block = workspace.block;
  const BlockStrides strides(block);
  const HeadLayout heads(block);
  const GateLayout gates(block);
  const int D = block.width;
  const TokenChunks<T> chunks = workspace.chunks(used);
  float* const* into = workspace.backward.grad_weights;
  for (int before = 0; before < n; ++before) into += net_weights(job.nets[before]);
  const WeightPlaces places(block);
  const auto same = [](int row) { return row; };
  const auto by_token = [&](const T* dy, long dy_stride, int outputs, const T* x, long x_stride, int inputs,
                            float* grad, auto row_of) {
    if (grad)
      weight_gradient(all, dy, dy_stride, outputs, x, x_stride, inputs, chunks, {grad, fresh}, workspace.panels,
                      mine.gradient_scratch, row_of);
  };
  for (int layer = 0; layer < job.nets[n].layers; ++layer, into += block_weights(block)) {
    const BlockActivations<T> act = first.activations(layer);
    const BlockGradients<T> grads = workspace.gradient_layer(layer, first.slot);
    const auto by_sequence = [&](const T* dy, int outputs, const T* x, int inputs, float* grad) {
      if (grad)
        sequence_weight_gradient(all, dy, outputs, x, inputs, strides.h, D, used, {grad, fresh}, workspace.panels,
                                 mine.gradient_scratch);
    };
    if (block.attention) {
      by_token(grads.qkv, strides.qkv, heads.columns(), act.h, strides.h, D, into[places.mixer_in],
               [&](int c) { return heads.qkv_row(c); });
      by_token(grads.ds1, strides.h, D, act.mixed, strides.mixed, heads.output_columns(), into[places.mixer_out], same);
    } else {
      by_sequence(grads.sequence_gate_up, 2 * block.seq_inner, act.h, block.seq_len, into[places.mixer_in]);
      by_sequence(grads.ds1, block.seq_len, act.mlp_t.activation, block.seq_inner, into[places.mixer_out]);
    }
    by_token(grads.gate_up, strides.gate_up, gates.columns(), act.h1, strides.h, D, into[places.up],
             [&](int c) { return gates.row(c); });
    if (block.conv_taps && (into[places.conv] || into[places.conv + 1]))
      conv_gradient(all, block, grads.dconv, act.activation, strides.activation, used, job.length,
                    {into[places.conv], fresh}, {into[places.conv + 1], fresh});
    by_token(grads.ds2, strides.h, D, down_input(block, act), strides.activation, block.inner, into[places.down], same);
    add_vector_gradients(all, block, grads, used, into, fresh);
  }
  const auto by_channel = [&](const float* sums, float* grad) {
    if (grad) vector_gradient(all, sums, strides.u, used, D, {grad, fresh}, same);
  };
  const NetShape& net = job.nets[n];
  if (net.final_norm && block.norm_weight) by_channel(workspace.gradients.final_norm(first.slot), *into++);
  const InjectionGradients<T> injection = workspace.gradients.injection(first.slot);
  if (net.injection == Injection::diagonal) by_channel(injection.sums, *into);
  if (net.injection == Injection::linear)
    by_token(injection.dh, strides.h, D, first.store().total(first.in_store()), strides.h, D, *into, same);
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
  if (workspace.recompute) workspace.activations.clear_padding(workspace.layers, slots);
  const int count = (slots.end - slots.begin) * job.length, padded = round_up(block.width, kPanel);
  const HeadLayout heads(block);
  for (int layer = 0; layer < workspace.layers; ++layer) {
    const BlockGradients<T> grads = workspace.gradients.layer(layer, slots.begin, {});
    clear_padding(grads.ds1, count, block.width, padded, strides.h);
    clear_padding(grads.ds2, count, block.width, padded, strides.h);
  }
  clear_padding(workspace.gradients.injection(slots.begin).dh, count, block.width, padded, strides.h);
  const int mixed = heads.output_columns();
  clear_padding(mine.buffers.dy, workspace.rows(), block.width, strides.u, strides.u);
  if (block.attention) clear_padding(mine.buffers.grad_mixed, workspace.rows(), mixed, strides.mixed, strides.mixed);
  workspace.tables.pack(job, all);
  all.sync();
}

template <class T> void program_backward(const BackwardJob& backward, void* memory, int thread) {
  const Job& job = backward.job;
  Arena arena(memory);
  const BackwardWorkspace<T> workspace(arena, backward);
  const Team all = everyone(job, thread);
  const BackwardThread<T> mine = workspace.thread(thread);
  all.begin("start");
  start_backward(workspace, all, mine);

  const long elements = static_cast<long>(job.batch) * job.length * job.width;
  // Behind the updates that are not wholly kept.
  const T* saved = static_cast<const T*>(backward.saved) +
                   (all_pairs(job) - backward.kept.pairs + job.batch - 1) / job.batch * elements;
  bool zero[kMostStates] = {}, summed[kMostNets] = {};
  int next = 0, used = 0, net = 0; // the next pair; slots in use, of one net
  Batch batch = {};
  const auto add_up = [&] {
    all.begin("weight gradients");
    store_weight_gradients(workspace, all, net, {workspace, batch.first, 0, batch.kept}, used, !summed[net], mine);
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
    if (next + job.batch > backward.kept.pairs) saved -= elements;
    for (int s = 0; s < update.num_sources; ++s) zero[job.program.sources[update.first_source + s]] = false;
    for (int sequence = 0; sequence < job.batch;) {
      if (used > 0 && (used == batch.room || net != update.net)) add_up();
      if (used == 0) batch = workspace.batch(next);
      net = update.net;
      const int wave = smaller(job.batch - sequence, batch.room - used);
      const auto place = [&](int index) { return Place<T>{workspace, next + index, used + index, batch.kept}; };
      const Division division(wave, job.threads);
      const Team self = alone(job, thread);
      for (int k = 0; k < division.each && !self.stopped(); k += workspace.together) {
        const int index = thread * division.each + k;
        slot_backward(workspace, self, update, saved, sequence + index, smaller(workspace.together, division.each - k),
                      place(index), mine, mine);
      }
      const RestTeam rest(job, division, thread);
      if (!rest.idle) {
        const int index = division.each * job.threads + rest.index;
        rest.team.sync(); // the team uses the first thread's buffers: wait until its own sequences are done
        slot_backward(workspace, rest.team, update, saved, sequence + index, 1, place(index),
                      workspace.thread(rest.first_thread), mine);
      }
      if (!all.sync()) return;
      next += wave;
      used += wave;
      sequence += wave;
    }
  }
  if (used > 0) add_up();
  split_norm_gradients(all, backward, summed);
}

template <class T> void backward(const BackwardJob& backward, void* memory, int thread) {
  program_backward<T>(backward, memory, thread);
  Dot<T>::release();
}

} // namespace TRMFAST_NAMESPACE
} // namespace trmfast
