// Runs csrc/cuda's forward recursion in the emulator: a shared library for ctypes (tests/simt_recursion.py).
#include "instances.h"
#include "launch_shape.h"
#include "pack.cuh"
#include "recursion_forward.cuh"
#include "simt.h"

#include <cstdio>
#include <cstring>

using namespace trmfast;
using namespace trmfast::gpu;

namespace {

// Mirrored field by field in tests/simt_recursion.py.
struct Request {
  int32_t is_bf16;
  int32_t width, inner, attention, heads, kv_heads, head_dim, causal, seq_len, seq_inner;
  float eps;
  int32_t batch, length, num_nets, num_states, num_updates;
  int32_t row_tiles, stages, width_tiles, token_tiles, strip_tiles; // the instance
  int32_t groups, resident_blocks;                                  // 0: as many as sequences; as many as the grid has
  int32_t order, check_races, truncate_mma;
  uint64_t seed, timeout_ns;
  const int32_t* layers;       // [num_nets]
  const uint32_t* updates;     // [num_updates][5]: dst, net, inject_x, index in saved or -1, number of sources
  const uint32_t* sources;     // [num_sources]
  const float* const* weights; // net by net, layer by layer, 4 each
  const uint16_t* const* states_in;
  uint16_t* const* states_out;
  const uint16_t* x;
  uint16_t* saved;
  const float* cos;
  const float* sin;
};

template <class I> constexpr InstanceSizes sizes_of() {
  return {I::kRowTiles, I::kRingStages, I::kWidthTiles, I::kTokenTiles, I::kStripTiles};
}

BlockShape block_of(const Request& r) {
  return {r.width,       r.inner,   r.attention != 0, r.heads, r.kv_heads, r.head_dim,
          r.causal != 0, r.seq_len, r.seq_inner,      0,       r.eps};
}

std::string text(const char* name, const simt::Accesses& a) {
  return std::string("\"") + name + "\": [" + std::to_string(a.count) + ", " + std::to_string(a.wavefronts) + ", " +
         std::to_string(a.ideal) + "]";
}

template <class I> std::string run(const Request& r) {
  using T = typename I::T;
  const BlockShape block = block_of(r);
  const InstanceSizes c = sizes_of<I>();
  if (!matches(c, block)) throw simt::Error("the instance does not run such a block");
  const LayerLayout layout(block);
  const size_t elements = static_cast<size_t>(r.batch) * r.length * r.width;

  simt::Options options;
  options.order = static_cast<simt::Order>(r.order);
  options.seed = r.seed;
  options.check_races = r.check_races != 0;
  options.truncate_mma = r.truncate_mma != 0;

  std::vector<std::unique_ptr<simt::GlobalArray<T>>> packed, in, out;
  int weight = 0;
  for (int net = 0; net < r.num_nets; ++net) {
    packed.push_back(std::make_unique<simt::GlobalArray<T>>("weights", layout.elements() * r.layers[net]));
    for (int layer = 0; layer < r.layers[net]; ++layer, weight += 4) {
      const int query = block.heads * block.head_dim;
      const int rows[4] = {block.attention ? query + 2 * block.kv_heads * block.head_dim : 2 * block.seq_inner,
                           block.attention ? block.width : block.seq_len, 2 * block.inner, block.width};
      const int columns[4] = {block.attention ? block.width : block.seq_len, block.attention ? query : block.seq_inner,
                              block.width, block.inner};
      PackParams<T> p{block, {}, {}, packed[net]->pointer() + layer * layout.elements()};
      std::vector<std::unique_ptr<simt::GlobalArray<float>>> sources;
      for (int i = 0; i < 4; ++i) {
        const size_t count = static_cast<size_t>(rows[i]) * columns[i];
        sources.push_back(std::make_unique<simt::GlobalArray<float>>("master", r.weights[weight + i], count));
        p.weights[i] = sources[i]->pointer();
        p.columns[i] = columns[i];
      }
      simt::launch(4, kThreads, 0, [&] { pack_layer(p); }, options);
    }
  }

  std::vector<Update> updates;
  const uint32_t* source = r.sources;
  for (int u = 0; u < r.num_updates; ++u) {
    const uint32_t* row = r.updates + 5 * u;
    updates.push_back(
        {static_cast<int>(row[0]), static_cast<int>(row[1]), {source, source + row[4]}, row[2] != 0, row[3] != 0});
    source += row[4];
  }
  const int group_blocks = ceil_div(r.length, 16 * c.row_tiles);
  const Schedule schedule(c, layout, group_blocks, r.num_states, updates, {r.layers, r.layers + r.num_nets});
  const simt::GlobalArray<uint32_t> steps("steps", schedule.steps), sources("sources", schedule.sources),
      runs("runs", schedule.runs);

  ForwardParams<T> p{};
  p.layout = layout;
  p.batch = r.batch;
  p.length = r.length;
  p.num_steps = static_cast<int>(schedule.steps.size() / 4);
  p.num_runs = static_cast<int>(schedule.runs.size() / 4);
  p.unwritten = schedule.unwritten;
  p.group_blocks = group_blocks;
  p.groups = r.groups > 0 ? r.groups : r.batch;
  p.steps = {reinterpret_cast<const U32x4*>(steps.pointer().pointer)};
  p.sources = sources.pointer();
  p.runs = {reinterpret_cast<const U32x4*>(runs.pointer().pointer)};
  for (int net = 0; net < r.num_nets; ++net) {
    packed[net]->reset_counters();
    p.weights[net] = packed[net]->pointer();
  }
  const auto array = [&](const char* name, const uint16_t* values, size_t count) {
    return std::make_unique<simt::GlobalArray<T>>(name, reinterpret_cast<const T*>(values), count);
  };
  for (int s = 0; s < r.num_states; ++s) {
    in.push_back(array("states_in", r.states_in[s], elements));
    out.push_back(std::make_unique<simt::GlobalArray<T>>("states_out", elements));
    p.states_in[s] = in[s]->pointer();
    p.states_out[s] = out[s]->pointer();
  }
  std::unique_ptr<simt::GlobalArray<T>> x, saved;
  if (r.x != nullptr) {
    x = array("x", r.x, elements);
    p.x = x->pointer();
  }
  if (schedule.saved > 0) {
    saved = std::make_unique<simt::GlobalArray<T>>("saved", elements * schedule.saved);
    p.saved = saved->pointer();
  }
  std::unique_ptr<simt::GlobalArray<float>> cos, sin;
  if (r.cos != nullptr) {
    const size_t count = static_cast<size_t>(r.length) * block.head_dim;
    cos = std::make_unique<simt::GlobalArray<float>>("cos", r.cos, count);
    sin = std::make_unique<simt::GlobalArray<float>>("sin", r.sin, count);
    p.cos = cos->pointer();
    p.sin = sin->pointer();
  }
  p.exchange_elements = exchange_elements(c, block, r.length);
  simt::GlobalArray<T> exchange("exchange", p.exchange_elements * p.groups);
  simt::GlobalArray<uint32_t> arrivals("arrivals", std::vector<uint32_t>(kArrivalStride * p.groups), true);
  simt::GlobalArray<uint32_t> failed("failed", std::vector<uint32_t>(1), true);
  p.exchange = exchange.pointer();
  p.arrivals = arrivals.pointer();
  p.failed = failed.pointer();
  p.timeout_ns = r.timeout_ns;

  const int blocks = p.groups * p.group_blocks, shared = shared_bytes(c, block);
  options.resident_blocks = r.resident_blocks > 0 ? r.resident_blocks : blocks;
  const simt::Counters counters = simt::launch(blocks, kThreads, shared, [&] { recursion_forward<I>(p); }, options);

  for (int s = 0; s < r.num_states; ++s) std::memcpy(r.states_out[s], out[s]->data(), elements * 2);
  if (schedule.saved > 0) std::memcpy(r.saved, saved->data(), elements * 2 * schedule.saved);

  std::string report =
      "{\"failed\": " + std::to_string(failed.data()[0]) + ", \"group_blocks\": " + std::to_string(p.group_blocks) +
      ", \"shared_bytes\": " + std::to_string(shared) + ", \"packed\": " + std::to_string(layout.elements()) +
      ", \"token_packed\": " + std::to_string(layout.token_elements()) +
      ", \"head_width\": " + std::to_string(layout.head_width) + ", \"mma\": " + std::to_string(counters.mma) +
      ", \"barriers\": " + std::to_string(counters.barriers) + ", " + text("ldmatrix", counters.ldmatrix) + ", " +
      text("shared_load", counters.shared_load) + ", " + text("shared_store", counters.shared_store) + ", " +
      text("cp_async", counters.cp_async) + ", \"conflicts\": {";
  const char* separator = "";
  for (const auto& line : counters.lines) {
    if (line.second.conflicts() == 0) continue;
    report += std::string(separator) + "\"" + line.first + "\": " + std::to_string(line.second.conflicts());
    separator = ", ";
  }
  // Loaded and stored bytes by kind of buffer.
  std::map<std::string, std::pair<uint64_t, uint64_t>> traffic;
  const auto add = [&](const char* name, const simt::GlobalCounters& counted) {
    traffic[name].first += counted.loaded_bytes;
    traffic[name].second += counted.stored_bytes;
  };
  for (const auto& a : packed) add("weights", a->counters());
  for (const auto& a : in) add("states_in", a->counters());
  for (const auto& a : out) add("states_out", a->counters());
  if (x) add("x", x->counters());
  if (saved) add("saved", saved->counters());
  if (cos) add("tables", cos->counters()), add("tables", sin->counters());
  add("exchange", exchange.counters());
  report += "}, \"traffic\": {";
  separator = "";
  for (const auto& entry : traffic) {
    report += std::string(separator) + "\"" + entry.first + "\": [" + std::to_string(entry.second.first) + ", " +
              std::to_string(entry.second.second) + "]";
    separator = ", ";
  }
  return report + "}}";
}

bool same(const InstanceSizes& a, const InstanceSizes& b) {
  return a.row_tiles == b.row_tiles && a.stages == b.stages && a.width_tiles == b.width_tiles &&
         a.token_tiles == b.token_tiles && a.strip_tiles == b.strip_tiles;
}

std::string dispatch(const Request& r) {
  const InstanceSizes wanted{r.row_tiles, r.stages, r.width_tiles, r.token_tiles, r.strip_tiles};
#ifdef TRMFAST_SHAPES_ALONE // compiles in a tenth of the time
#define TRY(...)                                                                                                       \
  if (same(wanted, InstanceSizes{__VA_ARGS__})) throw simt::Error("this library chooses launch shapes alone");
#else
#define TRY(...)                                                                                                       \
  if (same(wanted, sizes_of<Instance<bf16, __VA_ARGS__>>()))                                                           \
    return r.is_bf16 ? run<Instance<bf16, __VA_ARGS__>>(r) : run<Instance<fp16, __VA_ARGS__>>(r);
#endif
  TRMFAST_INSTANCES(TRY)
#undef TRY
  throw simt::Error("no such instance");
}

} // namespace

// 0: the report is JSON.  Otherwise it is the emulator's error.
extern "C" int trmfast_forward(const Request* request, char* report, int capacity) {
  int status = 0;
  std::string message;
  try {
    message = dispatch(*request);
  } catch (const std::exception& error) {
    message = error.what();
    status = 1;
  }
  std::snprintf(report, static_cast<size_t>(capacity), "%s", message.c_str());
  return status;
}

// The launch shape of a problem on a device as {row tiles, stages, width tiles, token tiles, strip tiles, groups,
// blocks of a group, bytes of shared memory}.  1: there is none, for the reason given.
extern "C" int trmfast_launch_shape(const Request* request, int conv_taps, int shared, int multiprocessors,
                                    int stream_rows, int cache_blocks, int32_t* shape, char* reason, int capacity) {
#define LISTED(...) InstanceSizes{__VA_ARGS__},
  const std::vector<InstanceSizes> instances{TRMFAST_INSTANCES(LISTED)};
#undef LISTED
  BlockShape block = block_of(*request);
  block.conv_taps = conv_taps;
  LaunchShape made{};
  const Device device{shared, multiprocessors, stream_rows, cache_blocks};
  const std::string refused = choose_launch(instances, block, request->batch, request->length, device, &made);
  const InstanceSizes& c = made.sizes;
  const int32_t words[8] = {c.row_tiles,   c.stages,    c.width_tiles,     c.token_tiles,
                            c.strip_tiles, made.groups, made.group_blocks, made.shared_bytes};
  std::memcpy(shape, words, sizeof words);
  std::snprintf(reason, static_cast<size_t>(capacity), "%s", refused.c_str());
  return refused.empty() ? 0 : 1;
}
