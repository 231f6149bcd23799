// The parts of a block, one at a time on one thread, with the engine's own code: a library that
// benchmarks/test_parts.py builds, loads and times.
//
//   g++ -std=c++17 -O3 -march=native -shared -fPIC -pthread benchmarks/parts.cpp csrc/cpu/monitor.cpp
//       csrc/cpu/thread_pool.cpp -o parts.so
//
// Activations and packed weights are random; the parts work on them where the engine would, tiles in L1, weights from
// L2 or L3.  A part may be run again and again: it does not read what it writes.
#define TRMFAST_NAMESPACE parts
#include "../csrc/cpu/recursion_forward.h"

#include <new>
#include <random>

using namespace trmfast;
using namespace trmfast::parts;

namespace {

std::mt19937 generator(1);

template <class T> T* fill(T* to, long count, float scale) {
  std::normal_distribution<float> normal(0, scale);
  for (long i = 0; i < count; ++i) {
    if constexpr (sizeof(T) == 4)
      to[i] = normal(generator);
    else
      to[i] = to_bf16(normal(generator));
  }
  return to;
}

struct Parts {
  virtual ~Parts() = default;
  virtual void run(int part) = 0;
  virtual void pack(const float* const* weights) = 0;
};

template <class T> struct Memory {
  float* tables;
  ForwardWeights<T> weights;
  ForwardBuffers<T> buffers;
  BlockScratch<T> scratch;
  T* out;

  Memory(Arena& arena, const BlockShape& block, int length)
      : tables(arena.take<float>(2L * length * HeadLayout(block).qk_width)), weights(arena, block),
        buffers(arena, block, length), scratch(arena, block, length, length),
        out(arena.take<T>(length * BlockStrides(block).h)) {}

  static Memory allocate(const BlockShape& block, int length) {
    Arena measure(nullptr);
    Memory(measure, block, length);
    Arena arena(::operator new(measure.used(), std::align_val_t(4096)));
    return Memory(arena, block, length);
  }
};

template <class T> struct PartsOf : Parts, Memory<T> {
  using Memory<T>::tables;
  using Memory<T>::weights;
  using Memory<T>::buffers;
  using Memory<T>::scratch;
  using Memory<T>::out;
  BlockShape block;
  int length;

  PartsOf(const BlockShape& block, int length)
      : Memory<T>(Memory<T>::allocate(block, length)), block(block), length(length) {
    const BlockStrides strides(block);
    const long rows = length;
    const auto panels = [&](T* to, int depth, int columns) { fill(to, packed_elements<T>(depth, columns), 0.05f); };
    const HeadLayout heads(block);
    const GateLayout gates(block);
    fill(tables, 2 * rows * heads.qk_width, 1.0f);
    if (block.attention) {
      panels(weights.qkv, block.width, heads.columns());
      panels(weights.output, heads.output_columns(), block.width);
      fill(buffers.act.qkv, rows * strides.qkv, 1.0f);
      fill(buffers.act.mixed, rows * strides.mixed, 1.0f);
    } else {
      fill(weights.seq_gate_up, 2L * block.seq_inner * row_stride(block.seq_len), 0.05f);
      fill(weights.seq_down, block.seq_len * row_stride(block.seq_inner), 0.05f);
    }
    panels(weights.gate_up, block.width, gates.columns());
    panels(weights.down, gates.activation_columns(), block.width);
    fill(buffers.act.h, rows * strides.h, 1.0f);
    fill(buffers.act.h1, rows * strides.h, 1.0f);
    fill(buffers.act.activation, rows * strides.activation, 1.0f);
    fill(buffers.u, rows * strides.u, 1.0f);
  }

  void run(int part) override {
    const BlockStrides strides(block);
    const HeadLayout heads(block);
    const Rope rope{tables, tables + static_cast<long>(length) * heads.qk_width, heads.qk_width};
    const BlockActivations<T>& act = buffers.act;
    switch (part) {
    case 0:
      gemm(kAlone, act.h, strides.h, length, weights.qkv, block.width, heads.columns(), scratch.tile,
           qkv_epilogue(block, weights.vectors, rope, length, act));
      break;
    case 1:
      attention_forward(kAlone, block, weights.vectors, Positions{rope, nullptr}, 1, length, act.qkv, strides.qkv,
                        act.mixed, strides.mixed, scratch.attention);
      break;
    case 2:
      mlp_t_forward(kAlone, block, weights.seq_gate_up, weights.seq_down, 1, act.h, strides.h, act.h1, act.mlp_t,
                    scratch.mlp_t);
      break;
    case 3:
      norm_result(kAlone, length, block, HalfResult<T>{nullptr, buffers.u, nullptr, nullptr, nullptr, out, strides.h});
      break;
    case 4:
      gemm(kAlone, act.h1, strides.h, length, weights.gate_up, block.width, GateLayout(block).columns(), scratch.tile,
           gate_up_epilogue(block, act));
      break;
    case 5:
      gemm(kAlone, act.activation, strides.activation, length, weights.down, block.inner, block.width, scratch.tile,
           [&](int row, int n, int panel, const float* tile) {
             add_residual(row, n, panel, tile, act.h1, strides.h, buffers.u, strides.u);
           });
      break;
    }
    Dot<T>::release();
  }
  void pack(const float* const* tensors) override {
    PackTurn turn(0, 1);
    pack_forward(block, tensors, weights, turn);
  }
};

} // namespace

extern "C" {

// bf16: the element type; attention: else the mlp_t mixer over `length` tokens.  Lives until the process ends.
void* make_parts(int bf16_elements, int attention, int width, int inner, int heads, int length, int seq_inner) {
  const BlockShape block{width,
                         inner,
                         attention != 0,
                         heads,
                         heads,
                         attention ? width / heads : 0,
                         false,
                         attention ? 0 : length,
                         attention ? 0 : seq_inner,
                         0,
                         1e-5f};
  if (bf16_elements) return static_cast<Parts*>(new PartsOf<bf16>(block, length));
  return static_cast<Parts*>(new PartsOf<float>(block, length));
}

// 0 query, key and value projection with rotation, 1 attention, 2 mlp_t, 3 norm, 4 gate and up projection with SwiGLU,
// 5 down projection with residual
void run_part(void* parts, int part) { static_cast<Parts*>(parts)->run(part); }

// weights: the f32 tensors of the block in the order of trmfast/spec.py
void pack_weights(void* parts, const float* const* weights) { static_cast<Parts*>(parts)->pack(weights); }
}
