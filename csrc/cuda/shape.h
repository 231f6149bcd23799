// Block sizes and constants shared by kernels, packing and launchers.  Host and device; no CUDA header.
//
// Sizes: B sequences of L tokens of D channels.  A group of G blocks of the grid (CTAs) owns a sequence, a CTA owns
// `rows` consecutive tokens of it.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define TRMFAST_BOTH __host__ __device__ __forceinline__
#else
#define TRMFAST_BOTH inline
#endif

namespace trmfast {
namespace gpu {

constexpr int kWarps = 8; // of a CTA; every warp owns the same share of a product's output columns
constexpr int kThreads = 32 * kWarps;
constexpr int kStageElements = 512; // of the weights of a warp: two squares of 16 output columns x 16 deep, 1 KB
constexpr int kSquare = 256;
constexpr int kPassInner = 16 * kWarps; // inner channels of a SwiGLU that are on chip at a time
constexpr int kPad = 8;                 // elements after a row in shared memory: rows fall into different banks
constexpr int kPlaceBytes = 128;        // at the start of shared memory (Place in group.cuh)
constexpr int kMostStates = 16;
constexpr int kMostNets = 8;

constexpr int kArrivalStride = 32; // words between the counters of two groups: different lines of the cache

// Bits of the first word of a step, and of a source (Schedule in launch_shape.h).
constexpr uint32_t kFirstLayer = 1u << 8, kLastLayer = 1u << 9;
constexpr uint32_t kSourceIsX = 1u << 8, kSourceIsWritten = 1u << 9;

// One block (trmfast/spec.py).  Not the BlockShape of csrc/cpu/engine.h: pybind11 registers a C++ type once in a
// process, so with a shared type the second extension module could not be imported.
struct BlockShape {
  int width;      // D
  int inner;      // inner width of the channel SwiGLU
  bool attention; // else mlp_t: a SwiGLU over the sequence axis
  int heads, kv_heads, head_dim;
  bool causal;
  int seq_len, seq_inner; // mlp_t
  int conv_taps;          // of a depthwise convolution after the gate; 0: none
  float eps;
};

TRMFAST_BOTH constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
TRMFAST_BOTH constexpr int round_up(int a, int b) { return ceil_div(a, b) * b; }
TRMFAST_BOTH constexpr int larger(int a, int b) { return a > b ? a : b; }
TRMFAST_BOTH constexpr int smaller(int a, int b) { return a < b ? a : b; }

// Channels of a zero-padded head: whole fragments, and few instances of the attention.
TRMFAST_BOTH constexpr int padded_head(int head_dim) { return head_dim <= 32 ? 32 : head_dim <= 64 ? 64 : 128; }

// An instance of the kernel.  Row and strip tiles have 16 elements; width and token tiles have 8 for each warp.
// token_tiles and strip_tiles are 0 for attention.
struct InstanceSizes {
  int row_tiles, stages, width_tiles, token_tiles, strip_tiles;
};

} // namespace gpu
} // namespace trmfast
