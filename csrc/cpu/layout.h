// Orders and sizes of packed matrices.  Every packed product has output columns in groups of kPanel = 32, chosen so
// that an epilogue finds what it combines inside one group:
//   query/key   16 channels of the first half of a head | their rotation partners in the second half
//   value       32 channels of a head
//   gate/up     16 gate columns | the 16 up columns that they multiply
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

// Columns of the query/key/value product.
struct HeadLayout {
  int heads, kv_heads, head_dim;
  int half;     // channels of a head that rotate with the other half
  int qk_width; // packed columns of one query or key head
  int v_width;  // packed columns of one value head

  explicit HeadLayout(const BlockShape& block)
      : heads(block.heads), kv_heads(block.kv_heads), head_dim(block.head_dim), half((block.head_dim + 1) / 2),
        qk_width(2 * round_up((block.head_dim + 1) / 2, kHalf)), v_width(round_up(block.head_dim, kPanel)) {}

  int query(int head) const { return head * qk_width; }
  int key(int kv_head) const { return (heads + kv_head) * qk_width; }
  int value(int kv_head) const { return (heads + kv_heads) * qk_width + kv_head * v_width; }
  int columns() const { return value(kv_heads); }
  int output_columns() const { return heads * head_dim; } // of the attention's output, not padded

  // Channel of a head for column c of its packed query or key, or -1.
  int qk_channel(int c) const {
    const int in_half = c / kPanel * kHalf + c % kHalf;
    if (in_half >= half) return -1;
    const int channel = c % kPanel < kHalf ? in_half : half + in_half;
    return channel < head_dim ? channel : -1;
  }
  int qkv_row(int c) const {
    const int rotated = (heads + kv_heads) * qk_width;
    if (c < rotated) {
      const int channel = qk_channel(c % qk_width);
      return channel < 0 ? -1 : c / qk_width * head_dim + channel;
    }
    const int channel = (c - rotated) % v_width;
    return channel < head_dim ? (heads + kv_heads + (c - rotated) / v_width) * head_dim + channel : -1;
  }
};

// Columns of the gate/up product and of the activation between the two products of a SwiGLU.
struct GateLayout {
  int inner;

  int activation_columns() const { return round_up(inner, kHalf); }
  int columns() const { return 2 * activation_columns(); }
  int row(int c) const {
    const int j = c / kPanel * kHalf + c % kHalf;
    return j < inner ? (c % kPanel < kHalf ? j : inner + j) : -1;
  }
};

} // namespace TRMFAST_NAMESPACE
} // namespace trmfast
