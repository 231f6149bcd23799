// Packs the f32 weights of one layer into the order of layout.h, rounded to nearest.  A thread makes 16 bytes: the 8
// elements of one column of one matrix.  This runs once per optimiser step, so its scattered reads do
// not matter.
#pragma once

#include "layout.h"
#include "primitives.cuh"

namespace trmfast {
namespace gpu {

template <class T> struct PackParams {
  BlockShape block;
  GlobalPtr<const float> weights[4]; // in the order of BlockSpec.weight_shapes
  int columns[4];                    // of each
  GlobalPtr<T> packed;               // LayerLayout::elements()
};

template <class T> DEVICE void pack_layer(const PackParams<T>& p) {
  const LayerLayout layout(p.block);
  const long vectors = layout.elements() / 8, step = static_cast<long>(block_count()) * thread_count();
  for (long v = static_cast<long>(block_index()) * thread_count() + thread_index(); v < vectors; v += step) {
    const int in_stage = static_cast<int>(v % (kStageElements / 8)), warp = static_cast<int>(v / 64 % kWarps);
    const PackedColumn from =
        layout.source(static_cast<int>(v / 64 / kWarps), warp, in_stage / 32, in_stage / 8 % 4, in_stage % 8);
    float x[8];
    for (int i = 0; i < 8; ++i) {
      const bool found = from.row >= 0 && from.depth[i] >= 0;
      const int64_t at = static_cast<int64_t>(from.row) * p.columns[from.weight] + from.depth[i];
      x[i] = found ? load_nc(p.weights[from.weight] + at) : 0.0f;
    }
    U32x4 out;
    for (int i = 0; i < 4; ++i) out.v[i] = pack<T>(x[2 * i], x[2 * i + 1]);
    store((p.packed + 8 * static_cast<int64_t>(v)).template as<U32x4>(), out);
  }
}

} // namespace gpu
} // namespace trmfast
