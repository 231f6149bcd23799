#include "memory.h"

#include <algorithm>
#include <cstring>
#include <new>

namespace trmfast {
std::string gpu::Site::text() const {
  const char* name = std::strrchr(file, '/');
  return std::string(name == nullptr ? file : name + 1) + ":" + std::to_string(line);
}

namespace simt {
namespace {

constexpr size_t kGuard = 64 << 10, kAlignment = 256;

std::vector<Buffer*>& buffers() { // by address
  static std::vector<Buffer*> all;
  return all;
}

} // namespace

Buffer::Buffer(std::string name, size_t bytes, bool writable)
    : name_(std::move(name)), bytes_(bytes), writable_(writable), cells_(nullptr) {
  // The guard zones are never touched, so they cost address space alone.
  const size_t body = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  allocation_ = static_cast<char*>(std::malloc(body + 2 * kGuard + kAlignment));
  if (allocation_ == nullptr) throw std::bad_alloc();
  const uintptr_t start = reinterpret_cast<uintptr_t>(allocation_) + kGuard;
  data_ = allocation_ + ((start + kAlignment - 1) / kAlignment * kAlignment - (start - kGuard));
  std::memset(data_, 0xff, bytes);
  if (writable) {
    cells_ = static_cast<Cell*>(std::calloc((bytes + 1) / 2 + 1, sizeof(Cell)));
    if (cells_ == nullptr) throw std::bad_alloc();
  }
  auto& all = buffers();
  all.insert(std::upper_bound(all.begin(), all.end(), this, [](Buffer* a, Buffer* b) { return a->data_ < b->data_; }),
             this);
}

Buffer::~Buffer() {
  auto& all = buffers();
  all.erase(std::find(all.begin(), all.end(), this));
  std::free(cells_);
  std::free(allocation_);
}

Buffer* Buffer::find(uintptr_t address) {
  static size_t last = 0;
  auto& all = buffers();
  const auto holds = [address](const Buffer* buffer) {
    const uintptr_t start = reinterpret_cast<uintptr_t>(buffer->data_);
    return address + kGuard >= start && address < start + buffer->bytes_ + kGuard;
  };
  if (last < all.size() && holds(all[last])) return all[last];
  const auto after = std::upper_bound(all.begin(), all.end(), address, [](uintptr_t a, Buffer* buffer) {
    return a + kGuard < reinterpret_cast<uintptr_t>(buffer->data_);
  });
  if (after == all.begin()) return nullptr;
  const size_t found = static_cast<size_t>(after - all.begin()) - 1;
  if (!holds(all[found])) return nullptr;
  last = found;
  return all[found];
}

void Buffer::host_write(size_t offset, const void* data, size_t bytes) {
  if (offset + bytes > bytes_ || offset % 2 != 0)
    throw Error(name_ + ": the host writes " + std::to_string(bytes) + " bytes at " + std::to_string(offset) + " of " +
                std::to_string(bytes_));
  if (bytes == 0) return;
  std::memcpy(data_ + offset, data, bytes);
  if (cells_ == nullptr) return; // fully written at construction
  for (size_t i = offset / 2; i < (offset + bytes + 1) / 2; ++i) cells_[i] = {kHost, 0, kHost, 0};
}

} // namespace simt
} // namespace trmfast
