#include "dispatch.h"

#include <stdexcept>

#include "isa.h"
#include "monitor.h"
#include "thread_pool.h"

namespace trmfast {

#define X(target, element) extern const Engine engine_##target##_##element;
TRMFAST_TARGETS
#undef X

namespace {

#define X(target, element) &engine_##target##_##element,
const Engine* const kEngines[] = {TRMFAST_TARGETS};
#undef X

} // namespace

std::vector<Pair> compiled_pairs() {
  std::vector<Pair> pairs;
  for (const Engine* engine : kEngines) pairs.push_back({engine->target, engine->element});
  return pairs;
}

const Engine& find_engine(const std::string& target, const std::string& element) {
  std::string compiled;
  for (const Engine* engine : kEngines) {
    if (engine->target == target && engine->element == element) {
      if (const char* reason = missing_reason(target))
        throw std::invalid_argument("target: got " + target + ", but " + reason);
      return *engine;
    }
    compiled += std::string(compiled.empty() ? "" : ", ") + engine->target + "/" + engine->element;
  }
  throw std::invalid_argument("target: got " + target + "/" + element + ", accepted are " + compiled);
}

PackedWeights::PackedWeights(const Engine& engine, const NetShape& net, const std::vector<const float*>& weights,
                             bool backward, int threads)
    : engine(engine), net(net), forward_(packed_weights_pool(), engine.packed_bytes(net, false)) {
  if (backward && !engine.backward) throw std::invalid_argument("backward: i8 is for inference");
  if (backward) backward_.emplace(packed_weights_pool(), engine.packed_bytes(net, true));
  parallel(threads, [&](int thread) {
    engine.pack(net, weights.data(), false, forward_.get(), thread, threads);
    if (backward) engine.pack(net, weights.data(), true, backward_->get(), thread, threads);
  });
}

namespace {

template <class SomeJob> void run_region(SomeJob job, size_t bytes, void (*body)(const SomeJob&, void*, int)) {
  const std::unique_ptr<SpinBarrier[]> barriers(new SpinBarrier[static_cast<size_t>(job.job.threads) + 1]);
  job.job.barriers = barriers.get();
  const Workspace workspace(bytes);
  parallel(job.job.threads, [&](int thread) { body(job, workspace.get(), thread); });
  if (job.job.monitor) job.job.monitor->end();
}

} // namespace

void run(const Engine& engine, const ForwardJob& job) {
  if (!engine.backward && (job.saved || job.kept.pairs || job.kept.output_pairs))
    throw std::invalid_argument("saved: i8 is for inference");
  run_region(job, engine.forward_bytes(job), engine.forward);
}

void run(const Engine& engine, const BackwardJob& job) {
  if (!engine.backward) throw std::invalid_argument("nets: i8 is for inference");
  run_region(job, engine.backward_bytes(job), engine.backward);
}

double measure_peak(const Engine& engine, int threads, double seconds) {
  std::vector<double> rates(static_cast<size_t>(threads));
  parallel(threads, [&](int thread) { rates[static_cast<size_t>(thread)] = engine.peak_gflops(seconds); });
  double sum = 0;
  for (const double rate : rates) sum += rate;
  return sum;
}

} // namespace trmfast
