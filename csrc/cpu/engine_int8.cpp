// The int8 engine of one instruction set, for inference: compiled once for each, as engine_target.cpp.

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define TRMFAST_JOIN_(a, b) a##_##b
#define TRMFAST_JOIN(a, b) TRMFAST_JOIN_(a, b)
#define TRMFAST_TEXT_(a) #a
#define TRMFAST_TEXT(a) TRMFAST_TEXT_(a)
#define TRMFAST_NAMESPACE TRMFAST_JOIN(TRMFAST_TARGET, i8)

#include "int8_forward.h"
#include "peak_int8.h"

namespace trmfast {
namespace TRMFAST_NAMESPACE {

size_t packed_bytes(const NetShape& net, bool) {
  Arena arena(nullptr);
  for (int layer = 0; layer < net.layers; ++layer) ForwardWeights<int8_t>(arena, net.block);
  return arena.used();
}

void pack(const NetShape& net, const float* const* weights, bool, void* packed, int thread, int threads) {
  Arena arena(packed);
  PackTurn turn(thread, threads);
  for (int layer = 0; layer < net.layers; ++layer, weights += block_weights(net.block))
    pack_forward(net.block, weights, ForwardWeights<int8_t>(arena, net.block), turn);
}

// The arrays of an Int8Product: the streamed rows of `product.rows_of_tile` and the panels.
struct ProductArrays {
  int rows, columns; // streamed rows, panel columns
  long stride;
  uint8_t* q;
  float* scales;
  Int8Matrix panels;
  float* tile;

  ProductArrays(Arena& arena, const Int8Product& p)
      : rows(p.left ? p.columns : p.rows), columns(p.left ? p.rows : p.columns), stride(int8_stride(p.depth)),
        q(arena.take<uint8_t>(rows * stride)), scales(arena.take<float>(rows)),
        panels(take_int8_matrix(arena, p.depth, columns)), tile(arena.take<float>(Dot<int8_t>::kRows * kPanel)) {}
};

size_t int8_product_bytes(const Int8Product& product) {
  Arena arena(nullptr);
  ProductArrays(arena, product);
  return arena.used();
}

void int8_product(const Int8Product& p) {
  Arena arena(p.workspace);
  const ProductArrays a(arena, p);
  const bf16* x = static_cast<const bf16*>(p.x);
  for (int r = 0; r < a.rows; ++r) {
    if (p.left)
      pack_int8_row(p.weights + static_cast<long>(r) * p.depth, p.depth, a.q + r * a.stride, a.stride, a.scales + r);
    else
      a.scales[r] = quantize_row(x + static_cast<long>(r) * p.depth, p.depth, a.q + r * a.stride);
  }
  const long bytes = panel_elements<int8_t>(p.depth);
  for (int first = 0; first < a.columns; first += kPanel) {
    int8_t* panel = a.panels.panels + first / kPanel * bytes;
    const int n = smaller(kPanel, a.columns - first);
    float* scales = a.panels.scales + first;
    int32_t* starts = a.panels.starts + first;
    if (p.left)
      quantize_panel(x + first, p.rows, p.depth, n, panel, scales, starts);
    else
      pack_int8_panel([&](int j) { return j < n ? p.weights + static_cast<long>(first + j) * p.depth : nullptr; },
                      p.depth, panel, scales, starts);
    const RowTiles<Dot<int8_t>> tiles(a.rows);
    for (int i = 0; i < tiles.count; ++i)
      for (int scaled = 0; scaled < 2; ++scaled) {
        const int row = tiles.begin(i);
        const Dequantize scale = scaled ? Dequantize{a.scales + row, scales} : Dequantize{};
        Dot<int8_t>::run(a.q + row * a.stride, a.stride, panel, padded_depth<int8_t>(p.depth), tiles.size(i), starts,
                         scale, a.tile, kPanel);
        for (int r = 0; r < tiles.size(i); ++r)
          __builtin_memcpy((scaled ? static_cast<void*>(p.result + static_cast<long>(row + r) * a.columns + first)
                                   : p.sums + static_cast<long>(row + r) * a.columns + first),
                           a.tile + r * kPanel, static_cast<size_t>(n) * 4);
      }
    for (int j = 0; j < n; ++j)
      for (int k = 0; k < p.depth; ++k)
        (p.left ? p.x_quantized : p.w_quantized)[static_cast<long>(first + j) * p.depth + k] =
            panel[k / 4 * 4L * kPanel + j * 4 + k % 4];
  }
  for (int r = 0; r < a.rows; ++r)
    for (int k = 0; k < p.depth; ++k)
      (p.left ? p.w_quantized : p.x_quantized)[static_cast<long>(r) * p.depth + k] =
          static_cast<int8_t>(a.q[r * a.stride + k] - 128);
  __builtin_memcpy(p.left ? p.w_scales : p.x_scales, a.scales, static_cast<size_t>(a.rows) * sizeof(float));
  __builtin_memcpy(p.left ? p.x_scales : p.w_scales, a.panels.scales, static_cast<size_t>(a.columns) * sizeof(float));
  Dot<int8_t>::release();
}

} // namespace TRMFAST_NAMESPACE

extern const Engine TRMFAST_JOIN(engine, TRMFAST_NAMESPACE);
const Engine TRMFAST_JOIN(engine, TRMFAST_NAMESPACE) = {
    TRMFAST_TEXT(TRMFAST_TARGET),
    "i8",
    TRMFAST_NAMESPACE::packed_bytes,
    TRMFAST_NAMESPACE::pack,
    nullptr,
    nullptr,
    TRMFAST_NAMESPACE::forward_bytes<int8_t>,
    TRMFAST_NAMESPACE::forward<int8_t>,
    nullptr,
    nullptr,
    TRMFAST_NAMESPACE::peak_gflops<int8_t>,
    TRMFAST_NAMESPACE::int8_product_bytes,
    TRMFAST_NAMESPACE::int8_product,
};

} // namespace trmfast
