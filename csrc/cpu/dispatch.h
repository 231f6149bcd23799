// The target-independent half of the engine: which compiled target serves which element, packed weights, and running a
// job on the thread pool.  Nothing here depends on instruction sets or on Python.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "engine.h"
#include "memory.h"

namespace trmfast {

struct Pair {
  std::string target, element;
};

// Every (target, element) pair in this binary, best target first.
std::vector<Pair> compiled_pairs();

// The engine of a pair.  Throws std::invalid_argument if the pair is not compiled or this machine cannot run it.
const Engine& find_engine(const std::string& target, const std::string& element);

// The weights of one net, packed for one engine.
class PackedWeights {
public:
  // weights: the f32 matrices layer by layer, block_weights() each.
  PackedWeights(const Engine& engine, const NetShape& net, const std::vector<const float*>& weights, bool backward,
                int threads);

  const Engine& engine;
  const NetShape net;
  PackedNet view() const { return {forward_.get(), backward_ ? backward_->get() : nullptr}; }
  size_t bytes() const { return forward_.bytes() + (backward_ ? backward_->bytes() : 0); }

private:
  PooledMemory forward_;
  std::optional<PooledMemory> backward_;
};

// Run on job.threads threads; fills in job.barriers.  A stopped job leaves unfinished results.
void run(const Engine& engine, const ForwardJob& job);
void run(const Engine& engine, const BackwardJob& job);

// Peak of register-only multiply-adds over all threads, GFLOP/s.
double measure_peak(const Engine& engine, int threads, double seconds);

} // namespace trmfast
