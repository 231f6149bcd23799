// What the lanes of a warp exchange: shuffles, votes, reductions.
#include "warp.h"

#include <algorithm>

namespace trmfast {
namespace ptx {
namespace {

enum class Shuffle { up, down, butterfly, index };

// value, which lane, clamp and segments, members; the predicate says whether the lane was within bounds.
template <Shuffle kMode, bool kPredicate> void shuffle(Warp& w, const Op& op, Mask m) {
  uint32_t values[kLanes];
  std::memcpy(values, w.reg<uint32_t>(op.src[0]), sizeof values);
  const uint32_t *which = w.reg<uint32_t>(op.src[1]), *bounds = w.reg<uint32_t>(op.src[2]);
  Mask inside = 0;
  uint32_t found[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(m >> lane & 1)) continue;
    const int b = which[lane] & 31, clamp = bounds[lane] & 31, segment = bounds[lane] >> 8 & 31;
    const int last = (lane & segment) | (clamp & ~segment), first = lane & segment;
    int from = kMode == Shuffle::up          ? lane - b
               : kMode == Shuffle::down      ? lane + b
               : kMode == Shuffle::butterfly ? lane ^ b
                                             : first | (b & ~segment);
    const bool is_inside = kMode == Shuffle::up ? from >= last : from <= last;
    if (!is_inside) from = lane;
    if (!(m >> from & 1))
      throw Fault("lane " + std::to_string(lane) + " reads lane " + std::to_string(from) + ", which takes no part");
    inside |= static_cast<Mask>(is_inside) << lane;
    found[lane] = values[from];
  }
  uint32_t* out = w.reg<uint32_t>(op.dst[0]);
  for (int lane = 0; lane < kLanes; ++lane)
    if (m >> lane & 1) out[lane] = found[lane];
  if (kPredicate) set_predicate(w, op.dst[1], m, inside);
}

template <class T, class F> void reduce(Warp& w, const Op& op, Mask m) {
  const Bits<T>* in = w.reg<T>(op.src[0]);
  bool first = true;
  T total{};
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(m >> lane & 1)) continue;
    total = first ? from_bits<T>(in[lane]) : F()(total, from_bits<T>(in[lane]));
    first = false;
  }
  for (int lane = 0; lane < kLanes; ++lane)
    if (m >> lane & 1) w.reg<T>(op.dst[0])[lane] = to_bits(total);
}

#define FUNCTION(NAME, ...)                                                                                            \
  struct NAME {                                                                                                        \
    template <class T> T operator()(T a, T b) const { return __VA_ARGS__; }                                            \
  }
FUNCTION(Add, a + b);
FUNCTION(Min, std::min(a, b));
FUNCTION(Max, std::max(a, b));
FUNCTION(And, a& b);
FUNCTION(Or, a | b);
FUNCTION(Xor, a ^ b);
#undef FUNCTION

void sync(Warp& w, const Op&, Mask m) {
  if (m != kAll) throw Fault("only all lanes together can be synchronised here");
  ++w.clock;
}

} // namespace

void add_collectives(Table& t) {
  t["shfl.sync.up.b32"] = {{"r=rrrr", shuffle<Shuffle::up, false>, Flow::masked},
                           {"rp=rrrr", shuffle<Shuffle::up, true>, Flow::masked}};
  t["shfl.sync.down.b32"] = {{"r=rrrr", shuffle<Shuffle::down, false>, Flow::masked},
                             {"rp=rrrr", shuffle<Shuffle::down, true>, Flow::masked}};
  t["shfl.sync.bfly.b32"] = {{"r=rrrr", shuffle<Shuffle::butterfly, false>, Flow::masked},
                             {"rp=rrrr", shuffle<Shuffle::butterfly, true>, Flow::masked}};
  t["shfl.sync.idx.b32"] = {{"r=rrrr", shuffle<Shuffle::index, false>, Flow::masked},
                            {"rp=rrrr", shuffle<Shuffle::index, true>, Flow::masked}};
  t["vote.sync.any.pred"] = {
      {"p=pr",
       [](Warp& w, const Op& op, Mask m) { set_predicate(w, op.dst[0], m, w.predicates[op.src[0]] & m ? kAll : 0); },
       Flow::masked}};
  t["vote.sync.all.pred"] = {{"p=pr",
                              [](Warp& w, const Op& op, Mask m) {
                                set_predicate(w, op.dst[0], m, (w.predicates[op.src[0]] & m) == m ? kAll : 0);
                              },
                              Flow::masked}};
  t["vote.sync.ballot.b32"] = {{"r=pr",
                                [](Warp& w, const Op& op, Mask m) {
                                  for (int i = 0; i < kLanes; ++i)
                                    if (m >> i & 1) w.reg<uint32_t>(op.dst[0])[i] = w.predicates[op.src[0]] & m;
                                },
                                Flow::masked}};
  t["redux.sync.add.u32"] = t["redux.sync.add.s32"] = {{"r=rr", reduce<uint32_t, Add>, Flow::masked}};
  t["redux.sync.min.u32"] = {{"r=rr", reduce<uint32_t, Min>, Flow::masked}};
  t["redux.sync.max.u32"] = {{"r=rr", reduce<uint32_t, Max>, Flow::masked}};
  t["redux.sync.min.s32"] = {{"r=rr", reduce<int32_t, Min>, Flow::masked}};
  t["redux.sync.max.s32"] = {{"r=rr", reduce<int32_t, Max>, Flow::masked}};
  t["redux.sync.and.b32"] = {{"r=rr", reduce<uint32_t, And>, Flow::masked}};
  t["redux.sync.or.b32"] = {{"r=rr", reduce<uint32_t, Or>, Flow::masked}};
  t["redux.sync.xor.b32"] = {{"r=rr", reduce<uint32_t, Xor>, Flow::masked}};
  t["bar.warp.sync"] = {{"=r", sync, Flow::masked}};
}

} // namespace ptx
} // namespace trmfast
