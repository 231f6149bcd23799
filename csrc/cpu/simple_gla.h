// What simple GLA has where attention has a softmax (trmfast/reference.py): key j counts for query i with
// q_i . k_j / sqrt(d) times exp(c_i - c_j), c the sums of the logarithms of the decays.  Tiles, panels and products are
// attention's.
//
// The sums are doubles, so that a difference of two large ones is exact enough.  A tile of query rows takes one
// exponential for each key, exp(c_row - c_j) of its first row, and one for each row, exp(c_i - c_row); their product
// replaces an exponential for every pair.  Up to the first row neither is above 1.  Where the decays of a tile are so
// strong that keys behind it could grow large, pairs within the tile take exponentials of their own.
#pragma once

#include "arena.h"
#include "mask.h"
#include "simd.h"

namespace trmfast {
namespace TRMFAST_NAMESPACE {

constexpr float kDecayUnit = 1.0f / 16; // 1 / DECAY_NORMALIZER of trmfast/spec.py

struct DecayScratch {
  double* total = nullptr; // c of one head, [L, to whole panels]
  float* keys = nullptr;   // of a tile, exp(c_row - c_j), [L, to whole panels]
  float* rows = nullptr;   // of a tile, scale exp(c_i - c_row), [most rows]

  DecayScratch(Arena& arena, const BlockShape& block, int length, int most_rows) {
    if (!block.decay) return;
    total = arena.take<double>(round_up(length, kPanel));
    keys = arena.take<float>(round_up(length, kPanel));
    rows = arena.take<float>(most_rows);
  }
};

// log(1 / (1 + e^-v)) within 2 ulp: log(1 + z) is 2 atanh(w) with w = z / (2 + z), at most 1/3 for z = e^-|v|.
TRMFAST_INLINE vf log_sigmoid(vf v) {
  const vf z = exp(min(-v, v)), w = z / (2.0f + z), square = w * w;
  vf p = broadcast(1.0f / 15);
  p = fma(p, square, broadcast(1.0f / 13));
  p = fma(p, square, broadcast(1.0f / 11));
  p = fma(p, square, broadcast(1.0f / 9));
  p = fma(p, square, broadcast(1.0f / 7));
  p = fma(p, square, broadcast(1.0f / 5));
  p = fma(p, square, broadcast(1.0f / 3));
  p = fma(p, square, broadcast(1.0f));
  return min(vf{}, v) - 2.0f * w * p;
}

// The logits of a head's decays: a column of the query/key/value product, with its bias.
template <class T> struct DecayLogits {
  const T* column;
  long stride;
  float bias;
  int length;

  // Those of kLanes tokens from t on.
  vf at(int t) const {
    float values[kLanes];
    for (int i = 0; i < kLanes; ++i) values[i] = t + i < length ? to_float(column[(t + i) * stride]) + bias : 0.0f;
    return load(values);
  }
};

template <class T> void sum_decays(const DecayLogits<T>& logits, const DecayScratch& scratch) {
  double total = 0;
  for (int t = 0; t < round_up(logits.length, kPanel); t += kLanes) {
    float values[kLanes];
    store(values, log_sigmoid(logits.at(t)) * kDecayUnit);
    for (int i = 0; i < kLanes; ++i) scratch.total[t + i] = total += values[i];
  }
}

// a - b[i]
TRMFAST_INLINE vf differences(double a, const double* b) {
  float values[kLanes];
  for (int i = 0; i < kLanes; ++i) values[i] = static_cast<float>(a - b[i]);
  return load(values);
}

// The decays between query rows row.. (n rows) and `keys`, whole panels.
class DecayTile {
public:
  DecayTile(const DecayScratch& scratch, float scale, const KeyRange& keys, int row, int n)
      : scratch_(scratch), scale_(scale), row_(row) {
    const double* total = scratch.total;
    end_ = total[row] - total[row + n - 1] < 4 ? keys.end : row + 1;
    for (int j = keys.begin; factored(j); j += kLanes) store(scratch.keys + j, exp(differences(total[row], total + j)));
    for (int r = 0; r < n; r += kLanes) {
      float values[kLanes];
      for (int i = 0; i < kLanes; ++i)
        values[i] = r + i < n ? static_cast<float>(total[row + r + i] - total[row]) : 0.0f;
      store(values, exp(load(values)) * scale);
      for (int i = 0; i < kLanes && r + i < n; ++i) scratch.rows[r + i] = values[i];
    }
  }

  // scale exp(c_i - c_j) of query i = row + r and kLanes keys from j on; of keys behind i, any value.
  TRMFAST_MEMBER vf at(int r, int j) const {
    if (factored(j)) return load(scratch_.keys + j) * broadcast(scratch_.rows[r]);
    return exp(differences(scratch_.total[row_ + r], scratch_.total + j)) * scale_;
  }

private:
  // Whether the scratch has the exponentials of kLanes keys from j on.
  TRMFAST_MEMBER bool factored(int j) const { return j + kLanes <= end_; }

  const DecayScratch& scratch_;
  float scale_;
  int row_, end_; // keys before the end have exponentials in the scratch
};

// value in the lanes of keys, from key j on, that are in `keys`, else 0: what a product with an unseen key gives may
// be NaN.
TRMFAST_INLINE vf of_keys(vf value, const KeyRange& keys, int j) {
  if (keys.begin <= j && j + kLanes <= keys.end) return value;
  const LaneIndex index;
  return (index.lanes >= keys.begin - j) & (index.lanes < keys.end - j) ? value : vf{};
}

// From the gradients of the sums c, [L], which are overwritten, to those of the logits, times `scale` of their row if
// that is not null.  Returns the sum over the tokens without it: the gradient of the bias.
template <class T>
float decay_backward(const DecayLogits<T>& logits, double* grad_total, const float* scale, T* grad_column) {
  const int length = logits.length;
  for (int t = length - 2; t >= 0; --t) grad_total[t] += grad_total[t + 1];
  double sum = 0;
  for (int t = 0; t < length; t += kLanes) {
    const int n = smaller(kLanes, length - t);
    float values[kLanes] = {};
    for (int i = 0; i < n; ++i) values[i] = static_cast<float>(grad_total[t + i]);
    const vf grad = load(values) * kDecayUnit / (1.0f + exp(logits.at(t))); // sigmoid(-logit)
    store(values, grad);
    for (int i = 0; i < n; ++i) {
      sum += values[i];
      store(grad_column + (t + i) * logits.stride, broadcast(values[i] * (scale ? scale[t + i] : 1.0f)), 1);
    }
  }
  return static_cast<float>(sum);
}

} // namespace TRMFAST_NAMESPACE
} // namespace trmfast
