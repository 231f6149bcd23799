// ldmatrix and mma, by the lane maps of the PTX manual: lane = 4 * g + t.
#include "access.h"

#include <cmath>

namespace trmfast {
namespace ptx {
namespace {

// Matrix i has 8 rows of 8 halves; lane 8 * i + j names row j.  Lane 4 * g + t gets [g][2t, 2t+1], transposed
// [2t, 2t+1][g].  Lanes read what others name, so the whole warp counts as the reader.
template <int kMatrices, bool kTransposed> void ldmatrix(Warp& w, const Op& op, Mask) {
  const uint32_t* rows = w.reg<uint32_t>(op.src[0]);
  for (int i = 0; i < kMatrices; ++i) {
    uint16_t matrix[8][8];
    for (int j = 0; j < 8; ++j) {
      const Actor all{w.block->epoch, w.clock, kMany, w.index};
      const uint32_t address = rows[8 * i + j] + static_cast<uint32_t>(op.offset[0]);
      std::memcpy(matrix[j], touch_shared(w, all, address, 16, Access::read, nullptr).data, 16);
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const uint32_t low = kTransposed ? matrix[2 * t][g] : matrix[g][2 * t];
      const uint32_t high = kTransposed ? matrix[2 * t + 1][g] : matrix[g][2 * t + 1];
      w.reg<uint32_t>(op.dst[i])[lane] = high << 16 | low;
    }
  }
}

float truncated(double x) {
  const float y = static_cast<float>(x);
  const uint32_t too_far = std::fabs(static_cast<double>(y)) > std::fabs(x);
  return from_bits<float>(to_bits(y) - too_far);
}

// d = a b + c with one rounding or, to show what a device may do, rounded to zero after every 8 (4) columns of a.
// Of c and d a lane has [g][2t, 2t+1], [g+8][same].
template <int kDepth> void multiply(Warp& w, const Op& op, const float (&a)[16][kDepth], const double (&b)[kDepth][8]) {
  const int step = w.block->truncate_mma ? kDepth / 2 : kDepth;
  const uint32_t* c = op.src + op.num_src - 4;
  double sums[16][8];
  for (int row = 0; row < 16; ++row)
    for (int i = 0; i < 8; ++i)
      sums[row][i] = from_bits<float>(w.reg<uint32_t>(c[row / 8 * 2 + i % 2])[row % 8 * 4 + i / 2]);
  for (int row = 0; row < 16; ++row) {
    double (&sum)[8] = sums[row];
    for (int first = 0; first < kDepth; first += step) {
      for (int k = first; k < first + step; ++k)
        for (int i = 0; i < 8; ++i) sum[i] += a[row][k] * b[k][i];
      if (w.block->truncate_mma)
        for (double& one : sum) one = truncated(one);
    }
  }
  for (int row = 0; row < 16; ++row)
    for (int i = 0; i < 8; ++i)
      w.reg<uint32_t>(op.dst[row / 8 * 2 + i % 2])[row % 8 * 4 + i / 2] = to_bits(static_cast<float>(sums[row][i]));
}

// m16n8k16.  a: [g][2t, 2t+1], [g+8][same], [g][2t+8, 2t+9], [g+8][same]; b: [2t, 2t+1][g], [2t+8, 2t+9][g].
template <float (*kWiden)(uint16_t)> void mma_half(Warp& w, const Op& op, Mask) {
  float a[16][16];
  double b[16][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int v = 0; v < 4; ++v) {
      const uint32_t bits = w.reg<uint32_t>(op.src[v])[lane];
      float* const place = &a[g + 8 * (v % 2)][2 * t + 8 * (v / 2)];
      place[0] = kWiden(static_cast<uint16_t>(bits));
      place[1] = kWiden(static_cast<uint16_t>(bits >> 16));
    }
    for (int v = 0; v < 2; ++v) {
      const uint32_t bits = w.reg<uint32_t>(op.src[4 + v])[lane];
      b[2 * t + 8 * v][g] = kWiden(static_cast<uint16_t>(bits));
      b[2 * t + 8 * v + 1][g] = kWiden(static_cast<uint16_t>(bits >> 16));
    }
  }
  multiply<16>(w, op, a, b);
}

float tf32(uint32_t bits) { return from_bits<float>(bits & ~0x1fffu); } // the low 13 bits are ignored

// m16n8k8.  a: [g][t], [g+8][t], [g][t+4], [g+8][t+4]; b: [t][g], [t+4][g].
void mma_tf32(Warp& w, const Op& op, Mask) {
  float a[16][8];
  double b[8][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int v = 0; v < 4; ++v) a[g + 8 * (v % 2)][t + 4 * (v / 2)] = tf32(w.reg<uint32_t>(op.src[v])[lane]);
    for (int v = 0; v < 2; ++v) b[t + 4 * v][g] = tf32(w.reg<uint32_t>(op.src[4 + v])[lane]);
  }
  multiply<8>(w, op, a, b);
}

} // namespace

void add_matrices(Table& t) {
  const std::string load = "ldmatrix.sync.aligned.m8n8.";
  t[load + "x1.shared.b16"] = {{"r=S", ldmatrix<1, false>, Flow::collective}};
  t[load + "x2.shared.b16"] = {{"rr=S", ldmatrix<2, false>, Flow::collective}};
  t[load + "x4.shared.b16"] = {{"rrrr=S", ldmatrix<4, false>, Flow::collective}};
  t[load + "x1.trans.shared.b16"] = {{"r=S", ldmatrix<1, true>, Flow::collective}};
  t[load + "x2.trans.shared.b16"] = {{"rr=S", ldmatrix<2, true>, Flow::collective}};
  t[load + "x4.trans.shared.b16"] = {{"rrrr=S", ldmatrix<4, true>, Flow::collective}};
  const std::string mma = "mma.sync.aligned.m16n8k";
  t[mma + "16.row.col.f32.bf16.bf16.f32"] = {{"rrrr=rrrrrrrrrr", mma_half<bf16_to_float>, Flow::collective}};
  t[mma + "16.row.col.f32.f16.f16.f32"] = {{"rrrr=rrrrrrrrrr", mma_half<f16_to_float>, Flow::collective}};
  t[mma + "8.row.col.f32.tf32.tf32.f32"] = {{"rrrr=rrrrrrrrrr", mma_tf32, Flow::collective}};
}

} // namespace ptx
} // namespace trmfast
