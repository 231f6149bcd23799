// The interface between the target-independent part of the engine and the code compiled once per instruction set:
// plain structs of sizes and pointers, so that no inline library code is shared across compiler flags.
//
// Sizes: B sequences of L tokens of D channels.  Elements are f32 or bf16 (the compute dtype), or i8: bf16 with int8
// operands in the products by weights.  Gradients returned by the engine are f32.
#pragma once

#include <cstddef>
#include <cstdint>

namespace trmfast {

class Monitor;
class SpinBarrier;

// What an attention's output is multiplied by before the output projection: nothing, or the sigmoid of one more
// projection, for every channel or for every head.
enum class OutputGate { none, channel, head };

// Between the two products of the channel mixer.
enum class Activation { swiglu, relu2, gelu };

// How the sum of an update's sources enters a net: see injection.h.
enum class Injection { add, diagonal, linear };

// One block (trmfast/spec.py).  Sizes in elements.
struct BlockShape {
  int width;      // D
  int inner;      // inner width of the channel mixer
  bool attention; // or simple GLA; else mlp_t: a SwiGLU over the sequence axis
  int heads, kv_heads, head_dim;
  bool causal;
  int seq_len, seq_inner; // mlp_t
  int conv_taps;          // of the depthwise convolution after the gate; 0: none
  float eps;
  // The norms of each half of the block: of what its first product reads, of what its last product gives, of the sum
  // with the residual.  Post-norm has the last alone, pre-norm the first alone, a sandwich the first and one other.
  bool input_norm = false, branch_norm = false, sum_norm = true;
  bool norm_weight = false; // all of them have a learned weight
  bool interleaved = false; // rotation of channels 2i and 2i + 1, not of i and i + head_dim / 2
  bool qk_norm = false, qk_norm_weight = false, qk_bias = false;
  OutputGate gate = OutputGate::none;
  int window = 0;     // a query sees keys less than this far away; 0: all
  bool decay = false; // simple GLA: a decay of keys with distance in place of the softmax; causal
  Activation activation = Activation::swiglu;
};

// Places of a block's tensors in the order of trmfast/spec.py; -1: it has none.
struct WeightPlaces {
  int mixer_in = 0, mixer_out = 1; // of the token mixer
  int up = 2, conv = -1, down = 3; // of the channel mixer; conv: the kernel, then its bias
  int decay_bias = -1, qk_bias = -1, q_norm = -1, k_norm = -1;
  int input_norm[2] = {-1, -1}, result_norm[2] = {-1, -1}; // of the two halves; result: of the branch or the sum
  int count = 4;                                           // of all

  // Inlined everywhere: the linker must not share it between instruction sets.
  [[gnu::always_inline]] constexpr explicit WeightPlaces(const BlockShape& block) {
    if (block.conv_taps) {
      conv = 3;
      down = 5;
      count = 6;
    }
    if (block.decay) decay_bias = count++;
    if (block.qk_bias) qk_bias = count++;
    if (block.qk_norm_weight) {
      q_norm = count++;
      k_norm = count++;
    }
    for (int half = 0; half < 2 && block.norm_weight; ++half) {
      if (block.input_norm) input_norm[half] = count++;
      if (block.branch_norm || block.sum_norm) result_norm[half] = count++;
    }
  }
};

[[gnu::always_inline]] constexpr int block_weights(const BlockShape& block) { return WeightPlaces(block).count; }

constexpr int kMostStates = 64;
constexpr int kMostNets = 16;
constexpr int kMostTaps = 8;

struct NetShape {
  BlockShape block;
  int layers;
  bool final_norm = false; // of the last block's output, with a learned weight if the block's norms have one
  Injection injection = Injection::add;
};

// Tensors of a net: those of its blocks, then the weights of its final norm and of its injection.
[[gnu::always_inline]] constexpr int net_weights(const NetShape& net) {
  return net.layers * block_weights(net.block) + (net.final_norm && net.block.norm_weight) +
         (net.injection != Injection::add);
}

struct Update {
  int dst;
  int first_source, num_sources; // a range of Program::sources
  bool inject_x;
  int net;
  bool grad;
};

struct Program {
  const Update* updates;
  int num_updates;
  const int* sources;
  int num_states;
};

// Weights of one net in panel order, packed for one target and element.
struct PackedNet {
  const void* forward;
  const void* backward; // transposed packs; may be null for a forward job
};

// All nets of a job have the same block.
struct Job {
  int batch, length, width;
  Program program;
  const NetShape* nets;
  const PackedNet* packed;
  int num_nets;
  const float* cos; // [L, head_dim] or null: no rotation
  const float* sin;
  int threads;
  SpinBarrier* barriers;             // threads + 1: one for all, then one per possible team
  Monitor* monitor;                  // or null
  const int32_t* segments = nullptr; // [B, L, 2] or null, see Mask
};

// What forward keeps for backward, which takes the (update, sequence) pairs of the window from its end: the last update
// first, and the sequences of an update in their order.  Of the first pairs in that order the activations are kept, of
// the next ones the outputs of the blocks, which spares the last product of each when the rest is computed again.
struct Kept {
  void* activations = nullptr; // kept_bytes(job, pairs)
  int pairs = 0;
  void* outputs = nullptr; // output_bytes(job, output_pairs)
  int output_pairs = 0;
};

struct ForwardJob {
  Job job;
  const void* const* states_in; // num_states x [B, L, D]
  void* const* states_out;      // the same; written by every update
  const void* x;                // [B, L, D] or null
  // [updates, B, L, D], the summed inputs of the updates with gradient that are not wholly kept, or null; where an
  // injection has a weight, the sums of the sources.
  void* saved;
  Kept kept;
};

struct BackwardJob {
  Job job;
  const void* const* grad_states_out; // num_states x [B, L, D] in the compute dtype; null: zero
  const void* saved;                  // as in ForwardJob: what was not kept is recomputed from it
  Kept kept;
  float* const* grad_states;  // num_states x [B, L, D]: running gradients, finally those of the incoming states
  float* grad_x;              // [B, L, D] or null
  float* const* grad_weights; // net by net, layer by layer; null if not requested.  Nothing is
                              // written for a net that no update with gradient applies
  size_t store_bytes;         // limit on the memory for operands of weight gradients
  // f32, as grad_weights; read where norms with learned weights stand before products, and may be null otherwise.
  const float* const* weights = nullptr;
  const void* x = nullptr; // as in ForwardJob, where an injection has a weight
};

// One product as the blocks compute it, for tests: bf16 x times f32 weights [columns, depth], both quantised.  With
// `left` the weights are the streamed rows and x the panel, as in mlp_t.
struct Int8Product {
  const void* x;        // [rows, depth]; left: [depth, rows]
  const float* weights; // [columns, depth]
  int rows, columns, depth;
  bool left;
  int8_t* x_quantized; // [rows, depth]
  float* x_scales;     // [rows]
  int8_t* w_quantized; // [columns, depth]
  float* w_scales;     // [columns]
  int32_t* sums;       // [rows, columns]; left: [columns, rows]
  float* result;       // the sums times the scales
  void* workspace;     // int8_product_bytes
};

// The code of one (target, element) pair.  Every function but the *_bytes is called by all threads of a region.
struct Engine {
  const char* target;
  const char* element;
  size_t (*packed_bytes)(const NetShape& net, bool backward);
  void (*pack)(const NetShape& net, const float* const* weights, bool backward, void* packed, int thread, int threads);
  size_t (*kept_bytes)(const Job& job, int pairs);
  size_t (*output_bytes)(const Job& job, int pairs);
  size_t (*forward_bytes)(const ForwardJob& job);
  void (*forward)(const ForwardJob& job, void* workspace, int thread);
  // Null for i8, which is for inference, as are kept_bytes and output_bytes.
  size_t (*backward_bytes)(const BackwardJob& job);
  void (*backward)(const BackwardJob& job, void* workspace, int thread);
  double (*peak_gflops)(double seconds);
  // Null but for i8.
  size_t (*int8_product_bytes)(const Int8Product& product);
  void (*int8_product)(const Int8Product& product);
};

// How B sequences are divided: `each` whole sequences per thread; teams of `team_size` threads take the `rest` (fewer
// than threads), one sequence per team.
struct Division {
  int each, rest, team_size;
  Division(int batch, int threads)
      : each(batch / threads), rest(batch % threads), team_size(batch % threads ? threads / (batch % threads) : 0) {}
};

} // namespace trmfast
