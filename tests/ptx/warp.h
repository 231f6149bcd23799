// A warp: registers of 32 lanes side by side, and where its lanes are in the program.
#pragma once

#include "memory.h"
#include "program.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#if defined(__GNUC__) && !defined(__clang__)
#define TRMFAST_LANES _Pragma("GCC ivdep") // registers are the same or do not overlap
#else
#define TRMFAST_LANES
#endif

namespace trmfast {
namespace ptx {

// What a register file holds of a T: 16 bits are kept in 32.
template <class T> using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;

template <class T> T from_bits(Bits<T> bits) {
  T value;
  if constexpr (sizeof(T) == 2) {
    const uint16_t low = static_cast<uint16_t>(bits);
    std::memcpy(&value, &low, sizeof value);
  } else {
    std::memcpy(&value, &bits, sizeof value);
  }
  return value;
}

template <class T> Bits<T> to_bits(T value) {
  if constexpr (sizeof(T) == 2) {
    uint16_t low;
    std::memcpy(&low, &value, sizeof value);
    return low;
  } else {
    Bits<T> bits;
    std::memcpy(&bits, &value, sizeof value);
    return bits;
  }
}

// Lanes that are at the same place.
struct Group {
  uint32_t pc;
  Mask mask;
};

// Bytes on their way from global to shared memory.
struct Copy {
  uint8_t lane;
  uint32_t group; // of the lane's commits
  uint32_t to, size, source_bytes;
  uint64_t from;
  std::array<uint8_t, 16> bytes; // what was there when it was issued
};

struct Block;

struct Warp {
  Block* block;
  uint16_t index;
  std::vector<uint32_t> narrow;
  std::vector<uint64_t> wide;
  std::vector<Mask> predicates;

  std::vector<Group> groups;
  size_t current = 0;
  Mask live = kAll;
  uint32_t clock = 0; // ticks with bar.warp.sync
  enum { running, waiting, done } state = running;
  const Op* barrier = nullptr; // where it waits
  uint64_t barrier_id = 0;

  std::vector<Copy> copies;
  std::array<uint32_t, kLanes> commits{};

  template <class T> Bits<T>* reg(uint32_t i) {
    if constexpr (sizeof(T) == 8)
      return wide.data() + static_cast<size_t>(i) * kLanes;
    else
      return narrow.data() + static_cast<size_t>(i) * kLanes;
  }

  Actor actor(int lane) const;
};

// What a device leaves open: whether source bytes of a cp.async are read when it is issued (early) or when somebody
// waits for it, and which of several lanes that store to one place wins.
enum class Arrival : uint8_t { late, early };

// Of other blocks of the launch: up to which epoch what they did is over.
using Known = std::unordered_map<uint32_t, uint32_t>;

struct Block {
  uint32_t number;
  uint32_t epoch;
  SharedMemory shared;
  GlobalMemory* global;
  const std::vector<uint32_t>* epoch_blocks;     // the block of each epoch of the launch
  uint32_t launch_epoch;                         // the first of the launch
  std::unordered_map<uint64_t, Known>* released; // by address; null: blocks share nothing that one of them writes
  const uint8_t* params;
  uint32_t param_bytes;
  Arrival arrival;
  bool truncate_mma;
  const uint64_t* now; // operations executed so far
  std::vector<Warp> warps;
  Known known;         // by all threads
  Known acquired = {}; // by one thread, so by all after the next barrier

  // Whether an epoch belongs to another block of this launch, and nothing orders what this block does after it.
  bool foreign(uint32_t e) const {
    if (e < launch_epoch) return false;
    const uint32_t other = (*epoch_blocks)[e - launch_epoch];
    if (other == number) return false;
    const auto found = known.find(other);
    return found == known.end() || found->second < e;
  }

  static void merge(Known& to, const Known& from) {
    for (const auto& one : from) to[one.first] = std::max(to[one.first], one.second);
  }

  // A thread makes known what all threads did before the last barrier, and what was known to them.
  void release(uint64_t address) {
    if (released == nullptr) return;
    Known& at = (*released)[address];
    merge(at, known);
    at[number] = epoch - 1;
  }

  // After the next barrier all threads know what was released there.
  void acquire(uint64_t address) {
    if (released == nullptr) return;
    const auto found = released->find(address);
    if (found != released->end()) merge(acquired, found->second);
  }
};

inline Actor Warp::actor(int lane) const {
  return {block->epoch, clock, static_cast<uint16_t>(index * kLanes + lane), index};
}

template <class R, class... A, class F, size_t... I>
void map_lanes(Warp& w, const Op& op, Mask mask, F f, std::index_sequence<I...>) {
  Bits<R>* out = w.reg<R>(op.dst[0]);
  const std::tuple<const Bits<A>*...> in{w.reg<A>(op.src[I])...};
  if (mask == kAll) {
    TRMFAST_LANES
    for (int i = 0; i < kLanes; ++i) out[i] = to_bits<R>(f(from_bits<A>(std::get<I>(in)[i])...));
  } else {
    for (int i = 0; i < kLanes; ++i)
      if (mask >> i & 1) out[i] = to_bits<R>(f(from_bits<A>(std::get<I>(in)[i])...));
  }
}

// result = f(operands) in the lanes of the mask.
template <class R, class... A, class F> void map(Warp& w, const Op& op, Mask mask, F f) {
  map_lanes<R, A...>(w, op, mask, f, std::index_sequence_for<A...>());
}

inline void set_predicate(Warp& w, uint32_t index, Mask mask, Mask value) {
  w.predicates[index] = (w.predicates[index] & ~mask) | (value & mask);
}

// A bit for each lane: f(a, b).
template <class T, class F> Mask test(Warp& w, const Op& op, F f) {
  const Bits<T>*a = w.reg<T>(op.src[0]), *b = w.reg<T>(op.src[1]);
  Mask found = 0;
  for (int i = 0; i < kLanes; ++i) found |= static_cast<Mask>(f(from_bits<T>(a[i]), from_bits<T>(b[i]))) << i;
  return found;
}

// Conversions, round to nearest even; NaN becomes 0x7fff, as on the device.
inline float bf16_to_float(uint16_t bits) { return from_bits<float>(static_cast<uint32_t>(bits) << 16); }
uint16_t float_to_bf16(float x);
float f16_to_float(uint16_t bits);
uint16_t float_to_f16(float x);

} // namespace ptx
} // namespace trmfast
