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

// One block (trmfast/spec.py).  Sizes in elements.
struct BlockShape {
  int width;      // D
  int inner;      // inner width of the channel SwiGLU
  bool attention; // else mlp_t: a SwiGLU over the sequence axis
  int heads, kv_heads, head_dim;
  bool causal;
  int seq_len, seq_inner; // mlp_t
  int conv_taps;          // of the depthwise convolution after the gate; 0: none
  float eps;
};

// Tensors of a block, in the order of trmfast/spec.py.
constexpr int block_weights(const BlockShape& block) { return block.conv_taps ? 6 : 4; }
constexpr int kMostStates = 64;
constexpr int kMostNets = 16;
constexpr int kMostTaps = 8;

struct NetShape {
  BlockShape block;
  int layers;
};

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
  SpinBarrier* barriers; // threads + 1: one for all, then one per possible team
  Monitor* monitor;      // or null
};

struct ForwardJob {
  Job job;
  const void* const* states_in; // num_states x [B, L, D]
  void* const* states_out;      // the same; written by every update
  const void* x;                // [B, L, D] or null
  void* saved;                  // [G, B, L, D], the summed input of each update with gradient; or null
  void* kept;                   // kept_bytes(job): the activations of every update with gradient; or null
};

struct BackwardJob {
  Job job;
  const void* const* grad_states_out; // num_states x [B, L, D] in the compute dtype; null: zero
  const void* saved;                  // as ForwardJob::saved
  const void* kept;                   // as ForwardJob::kept; null: recomputed from `saved`
  float* const* grad_states;          // num_states x [B, L, D]: running gradients, finally those of the incoming states
  float* grad_x;                      // [B, L, D] or null
  float* const* grad_weights;         // net by net, layer by layer; null if not requested.  Nothing is
                                      // written for a net that no update with gradient applies
  size_t store_bytes;                 // limit on the memory for operands of weight gradients
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
  size_t (*kept_bytes)(const Job& job);
  size_t (*forward_bytes)(const ForwardJob& job);
  void (*forward)(const ForwardJob& job, void* workspace, int thread);
  // Null for i8, which is for inference, as is kept_bytes.
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
