// Bounds and alignment.
#include "memory.h"

#include <algorithm>

namespace trmfast {
namespace ptx {

namespace {

constexpr uint64_t kNear = 4096; // what lies so far behind a piece is taken for an access beyond its end

bool is_before(uint64_t address, const Piece& piece) { return address < piece.base; }

} // namespace

void GlobalMemory::add(Piece piece) {
  const auto place = std::upper_bound(pieces_.begin(), pieces_.end(), piece.base, is_before);
  pieces_.insert(place, std::move(piece));
}

const Piece* GlobalMemory::find(uint64_t address) const {
  if (!placed_) {
    const uint64_t index = (address >> 40) - 1;
    return index < pieces_.size() ? &pieces_[index] : nullptr;
  }
  const auto after = std::upper_bound(pieces_.begin(), pieces_.end(), address, is_before);
  if (after == pieces_.begin()) return nullptr;
  const Piece& piece = *(after - 1);
  return address - piece.base < piece.bytes + kNear ? &piece : nullptr;
}

const Piece& GlobalMemory::at(uint64_t address, uint32_t size, bool writes) const {
  const Piece* const found = find(address);
  if (found == nullptr) throw Fault("address " + std::to_string(address) + " belongs to no buffer");
  const Piece& piece = *found;
  if (address % size != 0)
    throw Fault(piece.name + ": " + std::to_string(size) + " bytes at an address that is " +
                std::to_string(address % size) + " off");
  const int64_t offset = static_cast<int64_t>(address - piece.base);
  if (offset < 0 || static_cast<uint64_t>(offset) + size > piece.bytes)
    throw Fault(piece.name + ": bytes " + std::to_string(offset) + " to " + std::to_string(offset + size) + " of " +
                std::to_string(piece.bytes));
  if (writes && !piece.writable) throw Fault(piece.name + ": is only read, and was written");
  return piece;
}

SharedMemory::SharedMemory(uint32_t bytes, uint32_t first_epoch)
    : data_(bytes, 0xff), cells_((bytes + 1) / 2), first_epoch_(first_epoch) {}

uint32_t SharedMemory::at(uint32_t address, uint32_t size) const {
  if (address % size != 0)
    throw Fault("shared memory: " + std::to_string(size) + " bytes at an address that is " +
                std::to_string(address % size) + " off");
  const int64_t offset = static_cast<int64_t>(address) - kSharedBase;
  if (offset < 0 || static_cast<uint64_t>(offset) + size > data_.size())
    throw Fault("shared memory: bytes " + std::to_string(offset) + " to " + std::to_string(offset + size) + " of " +
                std::to_string(data_.size()));
  return static_cast<uint32_t>(offset);
}

} // namespace ptx
} // namespace trmfast
