#include "dispatch.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <stdexcept>

#include "arena.h"
#include "isa.h"
#include "thread_pool.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace trmfast {

#define X(target, element) extern const Engine engine_##target##_##element;
TRMFAST_TARGETS
#undef X

namespace {

#define X(target, element) &engine_##target##_##element,
const Engine* const kEngines[] = {TRMFAST_TARGETS};
#undef X

constexpr size_t kCacheLine = 64;
constexpr size_t kHugePage = size_t{2} << 20;

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

Memory::Memory(size_t bytes) : bytes_(bytes) {
  const size_t alignment = bytes >= 2 * kHugePage ? kHugePage : kCacheLine;
  void* memory = nullptr;
  if (posix_memalign(&memory, alignment, std::max(bytes, kCacheLine)) != 0) throw std::bad_alloc();
  memory_.reset(memory);
#if defined(__linux__)
  if (alignment == kHugePage) madvise(memory, bytes, MADV_HUGEPAGE);
#endif
}

void Memory::Free::operator()(void* memory) const { std::free(memory); }

PackedWeights::PackedWeights(const Engine& engine, const NetShape& net, const std::vector<const float*>& weights,
                             bool backward, int threads)
    : engine(engine), net(net), forward_(pack(weights, false, threads)),
      backward_(backward ? pack(weights, true, threads) : nullptr) {}

std::unique_ptr<Memory> PackedWeights::pack(const std::vector<const float*>& weights, bool backward,
                                            int threads) const {
  auto memory = std::make_unique<Memory>(engine.packed_bytes(net, backward));
  parallel(threads, [&](int thread) { engine.pack(net, weights.data(), backward, memory->get(), thread, threads); });
  return memory;
}

namespace {

// With AddressSanitizer all NaN: nothing of the last job may be read.
void make_poison([[maybe_unused]] const Memory& memory) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(memory.get(), memory.bytes());
  std::memset(memory.get(), 0xff, memory.bytes());
#endif
}

// The workspace of the last job, kept for the next one: mapping fresh memory would cost a tenth of a training step.
std::atomic<Memory*> kept_workspace{nullptr};

class Workspace {
public:
  explicit Workspace(size_t bytes) : memory_(kept_workspace.exchange(nullptr)) {
    if (!memory_ || memory_->bytes() < bytes) {
      memory_.reset(); // before there are two
      memory_ = std::make_unique<Memory>(bytes);
    }
    make_poison(*memory_);
  }
  ~Workspace() { delete kept_workspace.exchange(memory_.release()); }
  void* get() const { return memory_->get(); }

private:
  std::unique_ptr<Memory> memory_;
};

template <class SomeJob> void run_region(SomeJob job, size_t bytes, void (*body)(const SomeJob&, void*, int)) {
  const std::unique_ptr<SpinBarrier[]> barriers(new SpinBarrier[static_cast<size_t>(job.job.threads) + 1]);
  job.job.barriers = barriers.get();
  const Workspace workspace(bytes);
  parallel(job.job.threads, [&](int thread) { body(job, workspace.get(), thread); });
}

} // namespace

namespace {

// Never destroyed: an object that gives memory back may outlive every other static object.
std::mutex& pool_lock = *new std::mutex;
std::vector<std::unique_ptr<Memory>>& pool = *new std::vector<std::unique_ptr<Memory>>;
constexpr size_t kPooled = 2;

} // namespace

KeptActivations::KeptActivations(size_t bytes) : bytes_(bytes) {
  {
    const std::lock_guard<std::mutex> guard(pool_lock);
    const auto fits = std::find_if(pool.begin(), pool.end(), [&](const auto& memory) {
      return memory->bytes() >= bytes && memory->bytes() / 2 <= bytes;
    });
    if (fits != pool.end()) {
      memory_ = std::move(*fits);
      pool.erase(fits);
    }
  }
  if (!memory_) memory_ = std::make_unique<Memory>(bytes);
  make_poison(*memory_);
}

KeptActivations::~KeptActivations() {
  const std::lock_guard<std::mutex> guard(pool_lock);
  if (pool.size() >= kPooled) pool.erase(pool.begin());
  pool.push_back(std::move(memory_));
}

void release_workspace() {
  delete kept_workspace.exchange(nullptr);
  const std::lock_guard<std::mutex> guard(pool_lock);
  pool.clear();
}

void run(const Engine& engine, const ForwardJob& job) { run_region(job, engine.forward_bytes(job), engine.forward); }

void run(const Engine& engine, const BackwardJob& job) { run_region(job, engine.backward_bytes(job), engine.backward); }

double measure_peak(const Engine& engine, int threads, double seconds) {
  std::vector<double> rates(static_cast<size_t>(threads));
  parallel(threads, [&](int thread) { rates[static_cast<size_t>(thread)] = engine.peak_gflops(seconds); });
  double sum = 0;
  for (const double rate : rates) sum += rate;
  return sum;
}

namespace {

constexpr uint64_t kMultiplier = 0x9e3779b97f4a7c15; // odd: multiplying by it is one to one
constexpr size_t kChunk = size_t{1} << 16;           // bytes

// One to one in either argument.
uint64_t mix(uint64_t hash, uint64_t word) {
  hash = (hash ^ word) * kMultiplier;
  return hash << 29 | hash >> 35;
}

// Eight independent chains, each one to one in every word of its own, folded one to one.
uint64_t hash_chunk(const char* bytes, size_t size) {
  uint64_t lanes[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  size_t at = 0;
  for (; at + 64 <= size; at += 64) {
    uint64_t words[8];
    std::memcpy(words, bytes + at, 64);
    for (int i = 0; i < 8; ++i) lanes[i] = mix(lanes[i], words[i]);
  }
  uint64_t hash = size;
  for (; at < size; ++at) hash = mix(hash, static_cast<unsigned char>(bytes[at]));
  for (const uint64_t lane : lanes) hash = mix(hash, lane);
  return hash;
}

} // namespace

uint64_t fingerprint(const std::vector<const char*>& arrays, const std::vector<int64_t>& sizes, int threads) {
  struct Piece {
    const char* bytes;
    size_t size;
  };
  std::vector<Piece> pieces;
  for (size_t i = 0; i < arrays.size(); ++i) {
    const size_t bytes = static_cast<size_t>(sizes[i]);
    for (size_t at = 0; at < bytes; at += kChunk) pieces.push_back({arrays[i] + at, std::min(kChunk, bytes - at)});
  }
  std::vector<uint64_t> hashes(pieces.size());
  const auto hash_share = [&](size_t part, size_t parts) {
    for (size_t i = pieces.size() * part / parts; i < pieces.size() * (part + 1) / parts; ++i)
      hashes[i] = hash_chunk(pieces[i].bytes, pieces[i].size);
  };
  // Waking the pool pays from a few chunks on.
  if (threads == 1 || pieces.size() < 8)
    hash_share(0, 1);
  else
    parallel(threads, [&](int thread) { hash_share(static_cast<size_t>(thread), static_cast<size_t>(threads)); });
  uint64_t hash = 0;
  for (const uint64_t piece : hashes) hash = mix(hash, piece);
  return hash;
}

} // namespace trmfast
