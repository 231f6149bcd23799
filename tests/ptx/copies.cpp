// cp.async: bytes are poison until the thread that copies them waits.
#include "access.h"

#include <algorithm>

namespace trmfast {
namespace ptx {
namespace {

void arrive(Warp& w, Copy& copy) {
  const Actor actor = w.actor(copy.lane);
  SharedMemory& shared = w.block->shared;
  const uint32_t offset = shared.at(copy.to, copy.size);
  if (copy.source_bytes > 0 && w.block->arrival == Arrival::late) {
    const Piece& piece = w.block->global->at(copy.from, 2, false);
    std::memcpy(copy.bytes.data(), piece.data + (copy.from - piece.base), copy.source_bytes);
  }
  std::memcpy(shared.data() + offset, copy.bytes.data(), copy.size);
  for (uint32_t i = 0; i < copy.size / 2; ++i) {
    Cell& cell = shared.cells()[offset / 2 + i];
    cell.pending = 0;
    cell.touch(actor, Access::write, true);
  }
}

// [to], [from], size and, if fewer bytes are read and the rest is zero, how many.
void issue(Warp& w, const Op& op, Mask m) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(m >> lane & 1)) continue;
    Copy copy{};
    copy.lane = static_cast<uint8_t>(lane);
    copy.group = w.commits[lane];
    copy.size = w.reg<uint32_t>(op.src[2])[lane];
    copy.source_bytes = op.num_src > 3 ? w.reg<uint32_t>(op.src[3])[lane] : copy.size;
    if (copy.size != 4 && copy.size != 8 && copy.size != 16) throw Fault("4, 8 or 16 bytes can be copied");
    if (copy.source_bytes > copy.size || copy.source_bytes % 2 != 0)
      throw Fault("lane " + std::to_string(lane) + " reads " + std::to_string(copy.source_bytes) + " of " +
                  std::to_string(copy.size) + " bytes");
    copy.to = w.reg<uint32_t>(op.src[0])[lane] + static_cast<uint32_t>(op.offset[0]);
    copy.from = w.reg<uint64_t>(op.src[1])[lane] + static_cast<uint64_t>(op.offset[1]);
    const Actor actor = w.actor(lane);
    const Place place = touch_shared(w, actor, copy.to, copy.size, Access::write, nullptr);
    std::memset(place.data, 0xff, copy.size);
    for (uint32_t i = 0; i < copy.size / 2; ++i) place.cells[i].pending = 1;
    if (copy.source_bytes > 0) {
      if (copy.from % copy.size != 0)
        throw Fault("lane " + std::to_string(lane) + " copies " + std::to_string(copy.size) +
                    " bytes from an address that is " + std::to_string(copy.from % copy.size) + " off");
      for (uint32_t i = 0; i < copy.source_bytes; i += 2)
        std::memcpy(copy.bytes.data() + i, touch_global(w, actor, copy.from + i, 2, Access::read, nullptr).data, 2);
    }
    w.copies.push_back(copy);
  }
}

void commit(Warp& w, const Op&, Mask m) {
  for (int lane = 0; lane < kLanes; ++lane) w.commits[lane] += m >> lane & 1;
}

template <class F> void arrive_if(Warp& w, Mask m, F arrives) {
  auto keep = w.copies.begin();
  for (auto copy = w.copies.begin(); copy != w.copies.end(); ++copy) {
    if ((m >> copy->lane & 1) && arrives(*copy))
      arrive(w, *copy);
    else
      *keep++ = *copy;
  }
  w.copies.erase(keep, w.copies.end());
}

void wait_group(Warp& w, const Op& op, Mask m) {
  const uint32_t* left = w.reg<uint32_t>(op.src[0]);
  arrive_if(w, m, [&](const Copy& copy) { return copy.group + left[copy.lane] < w.commits[copy.lane]; });
}

void wait_all(Warp& w, const Op&, Mask m) {
  arrive_if(w, m, [](const Copy&) { return true; });
}

} // namespace

void add_copies(Table& t) {
  for (const char* level : {".ca", ".cg"})
    for (const char* hint : {"", ".L2::64B", ".L2::128B", ".L2::256B"})
      t["cp.async" + std::string(level) + ".shared.global" + hint] = {{"=SGrr", issue}, {"=SGr", issue}};
  t["cp.async.commit_group"] = {{"=", commit}};
  t["cp.async.wait_group"] = {{"=r", wait_group}};
  t["cp.async.wait_all"] = {{"=", wait_all}};
}

} // namespace ptx
} // namespace trmfast
