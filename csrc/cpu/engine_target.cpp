// The engine of one instruction set and element type: this file is compiled once for every pair, with the flags of the
// instruction set, TRMFAST_TARGET and TRMFAST_ELEMENT.  The code it includes lives in a namespace of the pair's own and
// calls no inline function of the standard library, which the linker could share between pairs.

// GCC's AVX-512 intrinsics pass an undefined register initialised with itself, which GCC then warns about (bug
// 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define TRMFAST_JOIN_(a, b) a##_##b
#define TRMFAST_JOIN(a, b) TRMFAST_JOIN_(a, b)
#define TRMFAST_TEXT_(a) #a
#define TRMFAST_TEXT(a) TRMFAST_TEXT_(a)
#define TRMFAST_NAMESPACE TRMFAST_JOIN(TRMFAST_TARGET, TRMFAST_ELEMENT)

#include "peak.h"
#include "recursion_backward.h"
#include "recursion_forward.h"

namespace trmfast {
namespace TRMFAST_NAMESPACE {

using f32 = float;
using Element = TRMFAST_ELEMENT;

size_t packed_bytes(const NetShape& net, bool backward) {
  Arena arena(nullptr);
  for (int layer = 0; layer < net.layers; ++layer) {
    if (backward)
      BackwardWeights<Element>(arena, net.block);
    else
      ForwardWeights<Element>(arena, net.block);
  }
  take_final_norm(arena, net);
  InjectionWeights<Element>(arena, net);
  return arena.used();
}

void pack(const NetShape& net, const float* const* weights, bool backward, void* packed, int thread, int threads) {
  Arena arena(packed);
  PackTurn turn(thread, threads);
  for (int layer = 0; layer < net.layers; ++layer, weights += block_weights(net.block)) {
    if (backward)
      pack_backward(net.block, weights, BackwardWeights<Element>(arena, net.block), turn);
    else
      pack_forward(net.block, weights, ForwardWeights<Element>(arena, net.block), turn);
  }
  float* final_norm = take_final_norm(arena, net);
  if (final_norm && turn.mine()) pack_channels(*weights, net.block.width, final_norm);
  if (final_norm) ++weights;
  const InjectionWeights<Element> injection(arena, net);
  if (net.injection != Injection::add) pack_injection(net, *weights, backward, injection, turn);
}

} // namespace TRMFAST_NAMESPACE

extern const Engine TRMFAST_JOIN(engine, TRMFAST_NAMESPACE);
const Engine TRMFAST_JOIN(engine, TRMFAST_NAMESPACE) = {
    TRMFAST_TEXT(TRMFAST_TARGET),
    TRMFAST_TEXT(TRMFAST_ELEMENT),
    TRMFAST_NAMESPACE::packed_bytes,
    TRMFAST_NAMESPACE::pack,
    TRMFAST_NAMESPACE::kept_bytes<TRMFAST_NAMESPACE::Element>,
    TRMFAST_NAMESPACE::output_bytes<TRMFAST_NAMESPACE::Element>,
    TRMFAST_NAMESPACE::forward_bytes<TRMFAST_NAMESPACE::Element>,
    TRMFAST_NAMESPACE::forward<TRMFAST_NAMESPACE::Element>,
    TRMFAST_NAMESPACE::backward_bytes<TRMFAST_NAMESPACE::Element>,
    TRMFAST_NAMESPACE::backward<TRMFAST_NAMESPACE::Element>,
    TRMFAST_NAMESPACE::peak_gflops<TRMFAST_NAMESPACE::Element>,
    nullptr,
    nullptr,
};

} // namespace trmfast
