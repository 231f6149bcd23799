// A program forward with int8 operands.  States, x and activations are bf16, as in recursion_forward.h.
#pragma once

#include "int8_block.h"
#include "recursion_forward.h"

namespace trmfast {
namespace TRMFAST_NAMESPACE {

template <> struct ForwardBuffers<int8_t> : ForwardBuffers<bf16> {
  Int8Operand operand;

  ForwardBuffers(Arena& arena, const BlockShape& block, int rows, bool)
      : ForwardBuffers<bf16>(arena, block, rows), operand(arena, block, rows) {}
};

inline void program_forward(const ForwardJob& forward, const Team& team, const Rope& rope, int first_sequence,
                            int sequences, const ForwardBuffers<int8_t>& buffers, const BlockScratch<int8_t>& scratch,
                            const bf16** states) {
  const Job& job = forward.job;
  const long first_row = static_cast<long>(first_sequence) * job.length;
  const int rows = sequences * job.length;
  const Positions positions = Positions{rope, job.segments}.of(first_sequence, job.length);
  for (int s = 0; s < job.program.num_states; ++s) states[s] = static_cast<const bf16*>(forward.states_in[s]);
  for (int i = 0; i < job.program.num_updates; ++i) {
    const Update& update = job.program.updates[i];
    const NetShape& net = job.nets[update.net];
    const long stride = BlockStrides(net.block).h;
    team.begin("sum of the sources");
    sum_sources<bf16>(team, job, update, states, static_cast<const bf16*>(forward.x), first_row, rows, buffers.act.h,
                      stride, nullptr);
    if (net.block.attention) quantize_rows(team, rows, buffers.act.h, stride, job.width, buffers.operand);
    if (!team.sync()) return;
    bf16* out = static_cast<bf16*>(forward.states_out[update.dst]);
    Arena weights(const_cast<void*>(job.packed[update.net].forward));
    for (int layer = 0; layer < net.layers; ++layer) {
      const bool last = layer + 1 == net.layers;
      block_forward(team, net.block, ForwardWeights<int8_t>(weights, net.block), positions, sequences, job.length,
                    buffers.act, buffers.operand, buffers.u, last ? out + first_row * job.width : buffers.act.h,
                    last ? job.width : stride, scratch);
    }
    states[update.dst] = out;
  }
}

} // namespace TRMFAST_NAMESPACE
} // namespace trmfast
