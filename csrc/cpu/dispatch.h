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

// The engine of a pair.  Throws std::invalid_argument where the pair is not compiled or the machine cannot run it.
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

// Run on job.threads threads; job.barriers is filled in here.  Of a job that is stopped the results are unfinished.
void run(const Engine& engine, const ForwardJob& job);
void run(const Engine& engine, const BackwardJob& job);

// Multiply-adds on registers alone, all threads together, GFLOP/s.
double measure_peak(const Engine& engine, int threads, double seconds);

} // namespace trmfast
