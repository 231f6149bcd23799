// The target-independent half of the engine: which compiled target serves which element, packed weights, and running a
// job on the thread pool.  Nothing here depends on instruction sets or on Python.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "engine.h"

namespace trmfast {

struct Pair {
  std::string target, element;
};

// Every (target, element) pair in this binary, best target first.
std::vector<Pair> compiled_pairs();

// The engine of a pair.  Throws std::invalid_argument where the pair is not compiled or the machine cannot run it.
const Engine& find_engine(const std::string& target, const std::string& element);

// Uninitialised memory, aligned to cache lines, and to huge pages when it is large.
class Memory {
public:
  explicit Memory(size_t bytes);
  void* get() const { return memory_.get(); }
  size_t bytes() const { return bytes_; }

private:
  struct Free {
    void operator()(void* memory) const;
  };
  std::unique_ptr<void, Free> memory_;
  size_t bytes_;
};

// The weights of one net, packed for one engine.
class PackedWeights {
public:
  // weights: the f32 matrices layer by layer, block_weights() each.
  PackedWeights(const Engine& engine, const NetShape& net, const std::vector<const float*>& weights, bool backward,
                int threads);

  const Engine& engine;
  const NetShape net;
  PackedNet view() const { return {forward_->get(), backward_ ? backward_->get() : nullptr}; }
  size_t bytes() const { return forward_->bytes() + (backward_ ? backward_->bytes() : 0); }

private:
  std::unique_ptr<Memory> pack(const std::vector<const float*>& weights, bool backward, int threads) const;

  std::unique_ptr<Memory> forward_, backward_;
};

// Run on job.threads threads; job.barriers is filled in here.
void run(const Engine& engine, const ForwardJob& job);
void run(const Engine& engine, const BackwardJob& job);

// The activations that a forward job keeps for backward.  Its memory is taken from that of earlier ones and given back:
// mapping it anew costs half of what keeping activations gains.
class KeptActivations {
public:
  explicit KeptActivations(size_t bytes);
  ~KeptActivations();
  KeptActivations(const KeptActivations&) = delete;
  void* get() const { return memory_->get(); }
  size_t bytes() const { return bytes_; }

private:
  size_t bytes_;
  std::unique_ptr<Memory> memory_;
};

// Frees the memory that is kept between jobs.
void release_workspace();

// Multiply-adds on registers alone, all threads together, GFLOP/s.
double measure_peak(const Engine& engine, int threads, double seconds);

// A fingerprint of the bytes of many arrays, the same for any number of threads.  It is certain to change when bytes of
// a single aligned word of 8 change; any other change goes unseen with a probability of about 2^-64.
uint64_t fingerprint(const std::vector<const char*>& arrays, const std::vector<int64_t>& sizes, int threads);

} // namespace trmfast
