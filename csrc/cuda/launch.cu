// Launches of one element type, TRMFAST_ELEMENT: bf16 or fp16.
#include "kernels.cuh"
#include "launch.h"

#define TRMFAST_JOIN_(a, b) a##_##b
#define TRMFAST_JOIN(a, b) TRMFAST_JOIN_(a, b)
#define TRMFAST_TEXT_(a) #a
#define TRMFAST_TEXT(a) TRMFAST_TEXT_(a)

namespace trmfast {
namespace gpu {
namespace {

using T = TRMFAST_ELEMENT;

constexpr int kPackBlocks = 512;

std::string text(cudaError_t error, const char* doing) {
  if (error == cudaSuccess) return "";
  cudaGetLastError(); // clears the error for the next call
  return std::string(doing) + ": " + cudaGetErrorString(error);
}

template <class P> P* pointer(Address address) { return reinterpret_cast<P*>(address); }

cudaStream_t stream_of(Address stream) { return reinterpret_cast<cudaStream_t>(stream); }

std::string pack_weights(const PackRequest& request) {
  const BlockShape& b = request.block;
  PackParams<T> p{};
  p.block = b;
  p.packed = {pointer<T>(request.packed)};
  const int query = b.heads * b.head_dim;
  const int columns[4] = {b.attention ? b.width : b.seq_len, b.attention ? query : b.seq_inner, b.width, b.inner};
  for (int i = 0; i < 4; ++i) {
    p.weights[i] = {pointer<const float>(request.weights[i])};
    p.columns[i] = columns[i];
  }
  pack_kernel<T><<<kPackBlocks, kThreads, 0, stream_of(request.stream)>>>(p);
  return text(cudaGetLastError(), "packing weights");
}

template <class I> constexpr InstanceSizes sizes_of() {
  return {I::kRowTiles, I::kRingStages, I::kWidthTiles, I::kTokenTiles, I::kStripTiles};
}

bool same(const InstanceSizes& a, const InstanceSizes& b) {
  return a.row_tiles == b.row_tiles && a.stages == b.stages && a.width_tiles == b.width_tiles &&
         a.token_tiles == b.token_tiles && a.strip_tiles == b.strip_tiles;
}

using Kernel = void (*)(ForwardParams<T>);

Kernel find(const InstanceSizes& wanted) {
#define TRY(...)                                                                                                       \
  if (same(wanted, sizes_of<Instance<T, __VA_ARGS__>>())) return recursion_forward_kernel<Instance<T, __VA_ARGS__>>;
  TRMFAST_INSTANCES(TRY)
#undef TRY
  return nullptr;
}

std::string allow_shared(Kernel kernel, int bytes) {
  return text(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "shared memory");
}

std::string occupancy(const InstanceSizes& sizes, int shared_bytes, int* blocks) {
  const Kernel kernel = find(sizes);
  const std::string error = allow_shared(kernel, shared_bytes);
  if (!error.empty()) return error;
  return text(cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, kernel, kThreads, shared_bytes), "occupancy");
}

std::string forward(const ForwardRequest& r) {
  const Kernel kernel = find(r.shape.sizes);
  const std::string error = allow_shared(kernel, r.shape.shared_bytes);
  if (!error.empty()) return error;
  ForwardParams<T> p{};
  p.layout = LayerLayout(r.block);
  p.batch = r.batch;
  p.length = r.length;
  p.groups = r.shape.groups;
  p.group_blocks = r.shape.group_blocks;
  p.num_steps = r.num_steps;
  p.num_runs = r.num_runs;
  p.unwritten = r.unwritten;
  p.steps = {pointer<const U32x4>(r.steps)};
  p.sources = {pointer<const uint32_t>(r.sources)};
  p.runs = {pointer<const U32x4>(r.runs)};
  for (size_t net = 0; net < r.weights.size(); ++net) p.weights[net] = {pointer<const T>(r.weights[net])};
  for (size_t s = 0; s < r.states_in.size(); ++s) {
    p.states_in[s] = {pointer<const T>(r.states_in[s])};
    p.states_out[s] = {pointer<T>(r.states_out[s])};
  }
  p.x = {pointer<const T>(r.x)};
  p.saved = {pointer<T>(r.saved)};
  p.cos = {pointer<const float>(r.cos)};
  p.sin = {pointer<const float>(r.sin)};
  p.exchange = {pointer<T>(r.exchange)};
  p.exchange_elements = r.shape.exchange_elements;
  p.arrivals = {pointer<uint32_t>(r.arrivals)};
  p.failed = {pointer<uint32_t>(r.failed)};
  p.timeout_ns = r.timeout_ns;

  // Cooperative: all blocks are resident together or the launch fails, so blocks of a group can wait for each other.
  cudaLaunchAttribute cooperative{};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(static_cast<unsigned>(r.shape.groups * r.shape.group_blocks));
  launch.blockDim = dim3(kThreads);
  launch.dynamicSmemBytes = static_cast<size_t>(r.shape.shared_bytes);
  launch.stream = stream_of(r.stream);
  launch.attrs = &cooperative;
  launch.numAttrs = r.shape.group_blocks > 1 ? 1 : 0;
  return text(cudaLaunchKernelEx(&launch, kernel, p), "launching the recursion");
}

} // namespace

extern const Element TRMFAST_JOIN(element, TRMFAST_ELEMENT);
const Element TRMFAST_JOIN(element, TRMFAST_ELEMENT) = {TRMFAST_TEXT(TRMFAST_ELEMENT), pack_weights, forward,
                                                        occupancy};

} // namespace gpu
} // namespace trmfast
