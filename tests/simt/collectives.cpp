// Warp-wide operations: matrices, shuffles, votes; and the counting of accesses.
#include "machine.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <tuple>

namespace trmfast {
namespace simt {
namespace {

constexpr int kBanks = 32;

template <class To, class From> To bits_of(From x) {
  static_assert(sizeof(To) == sizeof(From), "the same size");
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

// Passes over shared memory for the words that some lanes touch together: the most different words in one bank.
uint64_t wavefronts(const uint64_t* words, int count) {
  uint64_t different[kBanks][kLanes];
  uint8_t used[kBanks] = {};
  uint8_t most = 0;
  for (int i = 0; i < count; ++i) {
    const uint64_t bank = words[i] % kBanks;
    uint64_t* const end = different[bank] + used[bank];
    if (std::find(different[bank], end, words[i]) != end) continue;
    different[bank][used[bank]++] = words[i];
    most = std::max(most, used[bank]);
  }
  return most;
}

float truncated(double x) {
  const float y = static_cast<float>(x);
  return std::fabs(static_cast<double>(y)) > std::fabs(x) ? std::nextafter(y, 0.0f) : y;
}

} // namespace

// ---- numbers

float bf16_to_float(uint16_t bits) { return bits_of<float>(static_cast<uint32_t>(bits) << 16); }

uint16_t float_to_bf16(float x) {
  const uint32_t bits = bits_of<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

float fp16_to_float(uint16_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_of<float>(sign | 0x7f800000u | magnitude << 13);
  // Exponents of the two formats differ by 112; the product is exact, also for denormals.
  return bits_of<float>(sign | bits_of<uint32_t>(bits_of<float>(magnitude << 13) * 0x1p112f));
}

uint16_t float_to_fp16(float x) {
  const uint32_t bits = bits_of<uint32_t>(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u); // from 65520 on
  if (magnitude < 0x38800000u) // below 2^-14: one unit in the last place of 0.5 is the step of fp16's denormals
    return static_cast<uint16_t>(sign | (bits_of<uint32_t>(bits_of<float>(magnitude) + 0.5f) - 0x3f000000u));
  return static_cast<uint16_t>(sign | (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13);
}

// ---- collectives

void Machine::execute(Warp& warp, Operation operation, Site site) {
  switch (operation) {
  case Operation::kSyncWarp:
    ++counters_.warp_syncs;
    warp.advance();
    return;
  case Operation::kShuffle: {
    ++counters_.shuffles;
    uint32_t values[kLanes];
    for (int lane = 0; lane < kLanes; ++lane)
      values[lane] = static_cast<ShuffleArguments*>(warp.threads[lane].arguments)->value;
    for (int lane = 0; lane < kLanes; ++lane) {
      auto& arguments = *static_cast<ShuffleArguments*>(warp.threads[lane].arguments);
      arguments.result = values[arguments.lane];
    }
    return;
  }
  case Operation::kVote: {
    bool any = false, all = true;
    for (int lane = 0; lane < kLanes; ++lane) {
      const bool p = static_cast<VoteArguments*>(warp.threads[lane].arguments)->p;
      any |= p;
      all &= p;
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      auto& arguments = *static_cast<VoteArguments*>(warp.threads[lane].arguments);
      arguments.any = any;
      arguments.all = all;
    }
    return;
  }
  case Operation::kLdmatrix:
    return execute_ldmatrix(warp, site);
  case Operation::kMma:
    return execute_mma(warp);
  case Operation::kBlockBarrier:
  case Operation::kNamedSync:
  case Operation::kNamedArrive:
    return arrive(warp, operation, site);
  case Operation::kNone:
    return;
  }
}

void Machine::execute_ldmatrix(Warp& warp, Site site) {
  const int matrices = static_cast<LdmatrixArguments*>(warp.threads[0].arguments)->matrices;
  uint64_t passes = 0;
  for (int i = 0; i < matrices; ++i) {
    uint16_t matrix[8][8];
    uint64_t words[32];
    for (int j = 0; j < 8; ++j) {
      Thread& thread = warp.threads[8 * i + j];
      const uint32_t row = static_cast<LdmatrixArguments*>(thread.arguments)->row;
      std::memcpy(matrix[j], shared(row, sizeof matrix[j], false, thread, site, true), sizeof matrix[j]);
      for (uint32_t word = 0; word < 4; ++word) words[4 * j + static_cast<int>(word)] = row / 4 + word;
    }
    passes += wavefronts(words, 32);
    for (int lane = 0; lane < kLanes; ++lane) {
      const auto& arguments = *static_cast<LdmatrixArguments*>(warp.threads[lane].arguments);
      const int g = lane / 4, t = 2 * (lane % 4);
      const uint16_t low = arguments.transposed ? matrix[t][g] : matrix[g][t];
      const uint16_t high = arguments.transposed ? matrix[t + 1][g] : matrix[g][t + 1];
      arguments.registers[i] = static_cast<uint32_t>(low) | static_cast<uint32_t>(high) << 16;
    }
  }
  counters_.ldmatrix.add(1, passes, static_cast<uint64_t>(matrices));
  lines_[{site.file, site.line}].add(1, passes, static_cast<uint64_t>(matrices));
}

void Machine::execute_mma(Warp& warp) {
  ++counters_.mma;
  float a[16][16], b[16][8], d[16][8];
  const bool is_bf16 = static_cast<MmaArguments*>(warp.threads[0].arguments)->is_bf16;
  const auto convert = is_bf16 ? bf16_to_float : fp16_to_float;
  const auto unpack = [convert](uint32_t word, float& low, float& high) {
    low = convert(static_cast<uint16_t>(word));
    high = convert(static_cast<uint16_t>(word >> 16));
  };
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto& arguments = *static_cast<MmaArguments*>(warp.threads[lane].arguments);
    const int g = lane / 4, t = 2 * (lane % 4);
    for (int r = 0; r < 4; ++r) {
      const int row = g + 8 * (r % 2), column = t + 8 * (r / 2);
      unpack(arguments.a[r], a[row][column], a[row][column + 1]);
      d[g + 8 * (r / 2)][t + r % 2] = arguments.d[r];
    }
    unpack(arguments.b0, b[t][g], b[t + 1][g]);
    unpack(arguments.b1, b[t + 8][g], b[t + 9][g]);
  }
  if (options_.truncate_mma) {
    for (int m = 0; m < 16; ++m)
      for (int n = 0; n < 8; ++n) {
        double sum = static_cast<double>(d[m][n]);
        for (int k = 0; k < 16; ++k) sum += static_cast<double>(a[m][k]) * static_cast<double>(b[k][n]);
        d[m][n] = truncated(sum);
      }
  } else {
    for (int m = 0; m < 16; ++m)
      for (int k = 0; k < 16; ++k)
        for (int n = 0; n < 8; ++n) d[m][n] += a[m][k] * b[k][n];
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto& arguments = *static_cast<MmaArguments*>(warp.threads[lane].arguments);
    const int g = lane / 4, t = 2 * (lane % 4);
    for (int r = 0; r < 4; ++r) arguments.d[r] = d[g + 8 * (r / 2)][t + r % 2];
  }
}

// ---- counting

void Machine::log(Thread& thread, const Logged& entry) {
  thread.log.push_back(entry);
  thread.warp->logged = true;
}

// One warp-wide access; null for lanes that take no part.
void Machine::count(const Logged* const* lanes) {
  const Logged& one = **std::find_if(lanes, lanes + kLanes, [](const Logged* entry) { return entry != nullptr; });
  if (one.buffer != nullptr) {
    uint64_t sectors[kLanes];
    int count = 0;
    for (int lane = 0; lane < kLanes; ++lane)
      if (lanes[lane] != nullptr) sectors[count++] = lanes[lane]->address / 32;
    std::sort(sectors, sectors + count);
    const auto different = static_cast<uint64_t>(std::unique(sectors, sectors + count) - sectors);
    (one.is_store ? one.buffer->counters.stored_sectors : one.buffer->counters.loaded_sectors) += different;
    return;
  }
  // As many lanes at a time as move 128 bytes.
  const int words_per_lane = std::max(1, one.bytes / 4), lanes_at_once = kLanes / words_per_lane;
  uint64_t passes = 0, least = 0;
  for (int first = 0; first < kLanes; first += lanes_at_once) {
    uint64_t words[kLanes];
    int count = 0;
    for (int lane = first; lane < first + lanes_at_once; ++lane)
      for (int word = 0; word < words_per_lane && lanes[lane] != nullptr; ++word)
        words[count++] = lanes[lane]->address / 4 + static_cast<uint64_t>(word);
    if (count == 0) continue;
    passes += wavefronts(words, count);
    ++least;
  }
  (one.is_async   ? counters_.cp_async
   : one.is_store ? counters_.shared_store
                  : counters_.shared_load)
      .add(1, passes, least);
  lines_[{one.site.file, one.site.line}].add(1, passes, least);
}

void Machine::flush_log(Warp& warp) {
  warp.logged = false;
  const auto key = [](const Logged& entry) {
    return std::make_tuple(entry.site.file, entry.site.line, entry.buffer, entry.bytes, entry.is_store);
  };
  const std::vector<Logged>& first = warp.threads[0].log;
  bool uniform = true;
  for (int lane = 1; lane < kLanes && uniform; ++lane) {
    const std::vector<Logged>& log = warp.threads[lane].log;
    uniform = std::equal(log.begin(), log.end(), first.begin(), first.end(),
                         [&key](const Logged& x, const Logged& y) { return key(x) == key(y); });
  }
  if (uniform) {
    for (size_t i = 0; i < first.size(); ++i) {
      const Logged* lanes[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = &warp.threads[lane].log[i];
      count(lanes);
    }
  } else {
    using Key = decltype(key(first[0]));
    std::map<Key, std::vector<std::array<const Logged*, kLanes>>> accesses; // the n-th of each line
    for (int lane = 0; lane < kLanes; ++lane) {
      std::map<Key, size_t> seen;
      for (const Logged& entry : warp.threads[lane].log) {
        auto& all = accesses[key(entry)];
        const size_t n = seen[key(entry)]++;
        if (all.size() <= n) all.emplace_back();
        all[n][static_cast<size_t>(lane)] = &entry;
      }
    }
    for (const auto& line : accesses)
      for (const auto& lanes : line.second) count(lanes.data());
  }
  for (int lane = 0; lane < kLanes; ++lane) warp.threads[lane].log.clear();
}

// ---- the primitives

void ldmatrix(uint32_t* registers, int matrices, bool transposed, uint32_t row, Site site) {
  LdmatrixArguments arguments{registers, matrices, transposed, row};
  machine->collective(Operation::kLdmatrix, &arguments, site);
}

void mma(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, bool is_bf16, Site site) {
  MmaArguments arguments{d, a, b0, b1, is_bf16};
  machine->collective(Operation::kMma, &arguments, site);
}

void sync_warp(Site site) { machine->collective(Operation::kSyncWarp, nullptr, site); }

uint32_t shuffle(uint32_t value, int lane, Site site) {
  ShuffleArguments arguments{value, lane, 0};
  machine->collective(Operation::kShuffle, &arguments, site);
  return arguments.result;
}

bool vote(bool p, bool all, Site site) {
  VoteArguments arguments{p, false, false};
  machine->collective(Operation::kVote, &arguments, site);
  return all ? arguments.all : arguments.any;
}

void block_sync(Site site) {
  BarrierArguments arguments{0, machine->threads_per_block(), false, false, false};
  machine->collective(Operation::kBlockBarrier, &arguments, site);
}

bool block_vote(bool p, bool all, Site site) {
  BarrierArguments arguments{0, machine->threads_per_block(), p, false, false};
  machine->collective(Operation::kBlockBarrier, &arguments, site);
  return all ? arguments.all : arguments.any;
}

void named_barrier(int id, int threads, bool waits, Site site) {
  BarrierArguments arguments{id, threads, false, false, false};
  machine->collective(waits ? Operation::kNamedSync : Operation::kNamedArrive, &arguments, site);
}

} // namespace simt
} // namespace trmfast
