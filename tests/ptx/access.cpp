// Loads, stores and atomics.
#include "access.h"

#include <algorithm>

namespace trmfast {
namespace ptx {

Place touch_shared(Warp& w, const Actor& actor, uint32_t address, uint32_t size, Access access, const void* value) {
  SharedMemory& shared = w.block->shared;
  const uint32_t offset = shared.at(address, size);
  uint8_t* const data = shared.data() + offset;
  Cell* const cells = shared.cells() + offset / 2;
  for (uint32_t i = 0; i < size / 2; ++i) {
    const bool same = value != nullptr && std::memcmp(data + 2 * i, static_cast<const uint8_t*>(value) + 2 * i, 2) == 0;
    const char* wrong = access != Access::write && cells[i].write_epoch < shared.first_epoch() && !cells[i].pending
                            ? "nobody wrote there"
                            : cells[i].touch(actor, access, same);
    if (wrong != nullptr)
      throw Fault("lane " + std::to_string(actor.thread == kMany ? -1 : actor.thread % kLanes) + ", shared memory at " +
                  std::to_string(offset + 2 * i) + ": " + wrong);
  }
  return {data, cells};
}

Place touch_global(Warp& w, const Actor& actor, uint64_t address, uint32_t size, Access access, const void* value) {
  const bool writes = access == Access::write || access == Access::atomic;
  const Piece& piece = w.block->global->at(address, size, writes);
  if (writes && piece.writes != nullptr) *piece.writes += size / 2;
  const uint64_t offset = address - piece.base;
  uint8_t* const data = piece.data + offset;
  if (piece.cells == nullptr) return {data, nullptr};
  Cell* const cells = piece.cells + offset / 2;
  for (uint32_t i = 0; i < size / 2; ++i) {
    Cell& cell = cells[i];
    const bool same = value != nullptr && std::memcmp(data + 2 * i, static_cast<const uint8_t*>(value) + 2 * i, 2) == 0;
    const bool both_atomic = cell.atomic && (access == Access::atomic || access == Access::acquire);
    const char* wrong = w.block->foreign(cell.write_epoch) && !both_atomic ? "another block of this launch wrote there"
                        : writes && w.block->foreign(cell.read_epoch)      ? "another block of this launch read there"
                                                                           : cell.touch(actor, access, same);
    if (wrong != nullptr)
      throw Fault("lane " + std::to_string(actor.thread % kLanes) + ", " + piece.name + " at byte " +
                  std::to_string(offset + 2 * i) + ": " + wrong);
  }
  return {data, cells};
}

namespace {

enum class Space { shared, global };

template <Space kSpace>
Place touch(Warp& w, const Op& op, int lane, int address, uint32_t size, Access access, const void* value) {
  if constexpr (kSpace == Space::shared)
    return touch_shared(w, w.actor(lane),
                        w.reg<uint32_t>(op.src[address])[lane] + static_cast<uint32_t>(op.offset[address]), size,
                        access, value);
  else
    return touch_global(w, w.actor(lane),
                        w.reg<uint64_t>(op.src[address])[lane] + static_cast<uint64_t>(op.offset[address]), size,
                        access, value);
}

template <Space kSpace> uint64_t address_of(Warp& w, const Op& op, int lane) {
  if constexpr (kSpace == Space::shared) return w.reg<uint32_t>(op.src[0])[lane] + static_cast<uint64_t>(op.offset[0]);
  return w.reg<uint64_t>(op.src[0])[lane] + static_cast<uint64_t>(op.offset[0]);
}

template <Space kSpace, class T, int kCount, Access kAccess = Access::read> void load(Warp& w, const Op& op, Mask m) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(m >> lane & 1)) continue;
    const Place place = touch<kSpace>(w, op, lane, 0, sizeof(T) * kCount, kAccess, nullptr);
    T values[kCount];
    std::memcpy(values, place.data, sizeof values);
    if (kAccess == Access::acquire) w.block->acquire(address_of<kSpace>(w, op, lane));
    for (int i = 0; i < kCount; ++i) w.reg<T>(op.dst[i])[lane] = to_bits(values[i]);
  }
}

// Of lanes that store to one place at once only one does, and which is not defined: the first or the last.
template <Space kSpace> Mask winners(Warp& w, const Op& op, Mask m) {
  using Address = std::conditional_t<kSpace == Space::shared, uint32_t, uint64_t>;
  const Bits<Address>* at = w.reg<Address>(op.src[0]);
  const bool is_first = w.block->arrival == Arrival::early;
  for (int lane = 1; lane < kLanes; ++lane) {
    if (!(m >> lane & 1)) continue;
    for (int other = 0; other < lane; ++other) {
      if (!(m >> other & 1) || at[other] != at[lane]) continue;
      m &= ~(1u << (is_first ? lane : other));
      if (is_first) break;
    }
  }
  return m;
}

template <Space kSpace, class T, int kCount> void store(Warp& w, const Op& op, Mask m) {
  m = winners<kSpace>(w, op, m);
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(m >> lane & 1)) continue;
    T values[kCount];
    for (int i = 0; i < kCount; ++i) values[i] = from_bits<T>(w.reg<T>(op.src[1 + i])[lane]);
    const Place place = touch<kSpace>(w, op, lane, 0, sizeof values, Access::write, values);
    std::memcpy(place.data, values, sizeof values);
  }
}

// T in memory, R in the register.
template <class T, class R, int kCount> void load_param(Warp& w, const Op& op, Mask m) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(m >> lane & 1)) continue;
    const uint64_t at = w.reg<uint64_t>(op.src[0])[lane] + static_cast<uint64_t>(op.offset[0]);
    if (at % sizeof(T) != 0 || at + sizeof(T) * kCount > w.block->param_bytes)
      throw Fault("parameters: " + std::to_string(sizeof(T) * kCount) + " bytes at " + std::to_string(at) + " of " +
                  std::to_string(w.block->param_bytes));
    for (int i = 0; i < kCount; ++i) {
      T value;
      std::memcpy(&value, w.block->params + at + sizeof(T) * i, sizeof value);
      w.reg<R>(op.dst[i])[lane] = to_bits<R>(static_cast<R>(value));
    }
  }
}

enum Ordering { kRelaxed = 0, kAcquire = 1, kRelease = 2, kBoth = 3 };

// Lanes go one after the other.
template <Space kSpace, class T, bool kReturns, class F, Ordering kOrdering = kRelaxed>
void atomic(Warp& w, const Op& op, Mask m) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(m >> lane & 1)) continue;
    if (kSpace == Space::global && (kOrdering & kRelease)) w.block->release(address_of<kSpace>(w, op, lane));
    const Place place = touch<kSpace>(w, op, lane, 0, sizeof(T), Access::atomic, nullptr);
    T old;
    std::memcpy(&old, place.data, sizeof old);
    const T a = from_bits<T>(w.reg<T>(op.src[1])[lane]);
    const T b = op.num_src > 2 ? from_bits<T>(w.reg<T>(op.src[2])[lane]) : T();
    const T made = F()(old, a, b);
    std::memcpy(place.data, &made, sizeof made);
    if (kReturns) w.reg<T>(op.dst[0])[lane] = to_bits(old);
    if (kSpace == Space::global && (kOrdering & kAcquire)) w.block->acquire(address_of<kSpace>(w, op, lane));
  }
}

#define FUNCTION(NAME, ...)                                                                                            \
  struct NAME {                                                                                                        \
    template <class T> T operator()(T old, T a, T b) const {                                                           \
      (void)b;                                                                                                         \
      return __VA_ARGS__;                                                                                              \
    }                                                                                                                  \
  }
FUNCTION(Add, static_cast<T>(old + a));
FUNCTION(Min, std::min(old, a));
FUNCTION(Max, std::max(old, a));
FUNCTION(And, static_cast<T>(old& a));
FUNCTION(Or, static_cast<T>(old | a));
FUNCTION(Xor, static_cast<T>(old ^ a));
FUNCTION(Exchange, (void(old), a));
FUNCTION(CompareAndSwap, old == a ? b : old);
#undef FUNCTION

// nvcc puts the space behind the scope, Triton before it.
void name_atomic(Table& t, const char* space, const char* end, const char* ordering, Form returns, Form plain) {
  const std::string s = std::string(".") + space;
  for (const char* scope : {"", ".cta", ".gpu"})
    for (const std::string& name : {ordering + (scope + s), s + scope + ordering}) {
      t["atom" + name + end] = {returns};
      if (plain.run != nullptr) t["red" + name + end] = {plain};
    }
}

template <Space kSpace, class T, class F, Ordering kOrdering>
void add_ordered(Table& t, const char* end, const char* ordering) {
  const bool is_shared = kSpace == Space::shared;
  constexpr bool kSwaps = std::is_same<F, CompareAndSwap>::value;
  const char* const returns = kSwaps ? (is_shared ? "r=Srr" : "r=Grr") : (is_shared ? "r=Sr" : "r=Gr");
  name_atomic(t, is_shared ? "shared" : "global", end, ordering, {returns, atomic<kSpace, T, true, F, kOrdering>},
              {is_shared ? "=Sr" : "=Gr", kSwaps ? nullptr : atomic<kSpace, T, false, F, kOrdering>});
}

template <Space kSpace, class T, class F> void add_atomic(Table& t, const char* end) {
  add_ordered<kSpace, T, F, kRelaxed>(t, end, "");
  add_ordered<kSpace, T, F, kRelaxed>(t, end, ".relaxed");
  add_ordered<kSpace, T, F, kAcquire>(t, end, ".acquire");
  add_ordered<kSpace, T, F, kRelease>(t, end, ".release");
  add_ordered<kSpace, T, F, kBoth>(t, end, ".acq_rel");
}

template <Space kSpace> void add_atomics(Table& t) {
  add_atomic<kSpace, uint32_t, Add>(t, ".add.u32");
  add_atomic<kSpace, uint32_t, Add>(t, ".add.s32");
  add_atomic<kSpace, float, Add>(t, ".add.f32");
  add_atomic<kSpace, uint32_t, Min>(t, ".min.u32");
  add_atomic<kSpace, int32_t, Min>(t, ".min.s32");
  add_atomic<kSpace, uint32_t, Max>(t, ".max.u32");
  add_atomic<kSpace, int32_t, Max>(t, ".max.s32");
  add_atomic<kSpace, uint32_t, And>(t, ".and.b32");
  add_atomic<kSpace, uint32_t, Or>(t, ".or.b32");
  add_atomic<kSpace, uint32_t, Xor>(t, ".xor.b32");
  add_atomic<kSpace, uint32_t, Exchange>(t, ".exch.b32");
  add_atomic<kSpace, uint32_t, CompareAndSwap>(t, ".cas.b32");
}

struct Handlers {
  Handler load_shared, load_global, store_shared, store_global, load_param;
};

template <class T, int kCount> constexpr Handlers handlers() {
  return {load<Space::shared, T, kCount>, load<Space::global, T, kCount>, store<Space::shared, T, kCount>,
          store<Space::global, T, kCount>, load_param<T, T, kCount>};
}

constexpr const char* kLoads[3][3][3] = {{{"h=S", "hh=S", "hhhh=S"}, {"r=S", "rr=S", "rrrr=S"}, {"d=S", "dd=S"}},
                                         {{"h=G", "hh=G", "hhhh=G"}, {"r=G", "rr=G", "rrrr=G"}, {"d=G", "dd=G"}},
                                         {{"h=P", "hh=P", "hhhh=P"}, {"r=P", "rr=P", "rrrr=P"}, {"d=P", "dd=P"}}};
constexpr const char* kStores[2][3][3] = {{{"=Sh", "=Shh", "=Shhhh"}, {"=Sr", "=Srr", "=Srrrr"}, {"=Sd", "=Sdd"}},
                                          {{"=Gh", "=Ghh", "=Ghhhh"}, {"=Gr", "=Grr", "=Grrrr"}, {"=Gd", "=Gdd"}}};

// width: 0, 1, 2 for 16, 32 and 64 bits; count: 0, 1, 2 for one, two and four.
void name_accesses(Table& t, const std::string& letters, int width, int count, const Handlers& h) {
  for (const char letter : letters) {
    const std::string end =
        (count == 0 ? "." : ".v" + std::to_string(1 << count) + ".") + letter + std::to_string(16 << width);
    t["ld.shared" + end] = {{kLoads[0][width][count], h.load_shared}};
    t["st.shared" + end] = {{kStores[0][width][count], h.store_shared}};
    t["ld.param" + end] = {{kLoads[2][width][count], h.load_param}};
    for (const char* hint : {"", ".nc", ".ca", ".cg", ".cs", ".L1::evict_first", ".L1::evict_last", ".L1::no_allocate"})
      t["ld.global" + (hint + end)] = {{kLoads[1][width][count], h.load_global}};
    for (const char* hint : {"", ".wb", ".cg", ".cs", ".wt"})
      t["st.global" + (hint + end)] = {{kStores[1][width][count], h.store_global}};
  }
}

} // namespace

void add_accesses(Table& t) {
  name_accesses(t, "bus", 0, 0, handlers<uint16_t, 1>());
  name_accesses(t, "bus", 0, 1, handlers<uint16_t, 2>());
  name_accesses(t, "bus", 0, 2, handlers<uint16_t, 4>());
  name_accesses(t, "busf", 1, 0, handlers<uint32_t, 1>());
  name_accesses(t, "busf", 1, 1, handlers<uint32_t, 2>());
  name_accesses(t, "busf", 1, 2, handlers<uint32_t, 4>());
  name_accesses(t, "busf", 2, 0, handlers<uint64_t, 1>());
  name_accesses(t, "busf", 2, 1, handlers<uint64_t, 2>());
  t["ld.param.s32"].push_back({"d=P", load_param<int32_t, int64_t, 1>});
  t["ld.param.u8"] = t["ld.param.b8"] = {{"h=P", load_param<uint8_t, uint16_t, 1>}};
  t["ld.acquire.gpu.global.u32"] =
      t["ld.acquire.gpu.global.b32"] = {{"r=G", load<Space::global, uint32_t, 1, Access::acquire>}};
  t["st.release.gpu.global.u32"] =
      t["st.release.gpu.global.b32"] = {{"=Gr", atomic<Space::global, uint32_t, false, Exchange, kRelease>}};
  t["prefetch.global.L2"] = {{"=G", [](Warp&, const Op&, Mask) {}}};
  add_atomics<Space::shared>(t);
  add_atomics<Space::global>(t);
}

} // namespace ptx
} // namespace trmfast
