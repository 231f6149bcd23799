// Orders and sizes of packed matrices.  Every packed product has output columns in groups of kPanel = 32, chosen so
// that an epilogue finds what it combines inside one group:
//   query/key   16 channels of the first half of a head | their rotation partners in the second half
//   value       32 channels of a head; gates of the attention's output likewise, then decays
//   gate/up     16 gate columns | the 16 up columns that they multiply, or 32 up columns without a gate
// Heads are padded to whole groups with zero weights.  A map gives, for a packed column, the row of the weight, or -1.
#pragma once

#include "engine.h"

namespace trmfast {
namespace TRMFAST_NAMESPACE {

constexpr int kPanel = 32;
constexpr int kHalf = 16;

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
constexpr int round_up(int a, int b) { return ceil_div(a, b) * b; }
constexpr int smaller(int a, int b) { return a < b ? a : b; }
constexpr int larger(int a, int b) { return a > b ? a : b; }
constexpr long larger(long a, long b) { return a > b ? a : b; }

// Leading dimension of an activation with `columns` channels: whole groups, so that products may read a padded depth
// (the owner keeps the padding zero), and one more group so that consecutive rows do not fall into the same cache sets.
constexpr long row_stride(int columns) { return round_up(columns, kPanel) + kPanel; }

// Columns of the query/key/value product: queries, keys, values, and the gate of the attention's output and the decays
// if there are any, whose rows come first in the weight.
struct HeadLayout {
  int heads, kv_heads, head_dim;
  int half;         // channels of a head that rotate with the other half
  int qk_width;     // packed columns of one query or key head
  int v_width;      // packed columns of one value head
  int gates;        // of a token
  int decays;       // of a token
  bool interleaved; // rotation

  explicit HeadLayout(const BlockShape& block)
      : heads(block.heads), kv_heads(block.kv_heads), head_dim(block.head_dim), half((block.head_dim + 1) / 2),
        qk_width(2 * round_up((block.head_dim + 1) / 2, kHalf)), v_width(round_up(block.head_dim, kPanel)),
        gates(block.gate == OutputGate::none ? 0 : block.heads * (block.gate == OutputGate::head ? 1 : head_dim)),
        decays(block.decay ? block.heads : 0), interleaved(block.interleaved) {}

  int query(int head) const { return head * qk_width; }
  int key(int kv_head) const { return (heads + kv_head) * qk_width; }
  int value(int kv_head) const { return (heads + kv_heads) * qk_width + kv_head * v_width; }
  int gate() const { return value(kv_heads); }
  int decay(int head) const { return gate() + gates + head; }
  int columns() const { return gate() + round_up(gates + decays, kPanel); }
  int output_columns() const { return heads * head_dim; } // of the attention's output, not padded
  int rows_ahead() const { return gates + decays; }       // of the weight, before those of queries
  int qkv_rows() const { return rows_ahead() + (heads + 2 * kv_heads) * head_dim; }

  // Channel of a head for column c of its packed query or key, or -1.
  int qk_channel(int c) const {
    const int in_half = c / kPanel * kHalf + c % kHalf, second = c % kPanel < kHalf ? 0 : 1;
    if (in_half >= half) return -1;
    const int channel = interleaved ? 2 * in_half + second : in_half + second * half;
    return channel < head_dim ? channel : -1;
  }
  // Channel of all query, then all key heads for a packed column of theirs, or -1.
  int qk_index(int c) const {
    const int channel = qk_channel(c % qk_width);
    return channel < 0 ? -1 : c / qk_width * head_dim + channel;
  }
  int qkv_row(int c) const {
    if (c >= gate()) return c - gate() < rows_ahead() ? c - gate() : -1;
    if (c < value(0)) return qk_index(c) < 0 ? -1 : rows_ahead() + qk_index(c);
    const int channel = (c - value(0)) % v_width;
    return channel < head_dim ? rows_ahead() + (heads + kv_heads + (c - value(0)) / v_width) * head_dim + channel : -1;
  }
};

// Columns of the channel mixer's first product and of the activation between the two products.
struct GateLayout {
  int inner;
  bool has_gate; // SwiGLU: gate and up; else up alone

  explicit GateLayout(const BlockShape& block) : inner(block.inner), has_gate(block.activation == Activation::swiglu) {}

  int activation_columns() const { return round_up(inner, has_gate ? kHalf : kPanel); }
  int columns() const { return has_gate ? 2 * activation_columns() : activation_columns(); }
  int rows() const { return has_gate ? 2 * inner : inner; } // of the weight
  int row(int c) const {
    const int j = has_gate ? c / kPanel * kHalf + c % kHalf : c;
    return j < inner ? (has_gate && c % kPanel >= kHalf ? inner + j : j) : -1;
  }
};

} // namespace TRMFAST_NAMESPACE
} // namespace trmfast
