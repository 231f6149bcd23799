// Bounds and alignment.
#include "memory.h"

namespace trmfast {
namespace ptx {

const Piece& GlobalMemory::at(uint64_t address, uint32_t size, bool writes) const {
  const uint64_t index = (address >> 40) - 1;
  if (index >= pieces_.size()) throw Fault("address " + std::to_string(address) + " belongs to no buffer");
  const Piece& piece = pieces_[index];
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
