// What Python calls through ctypes (tests/ptx_tools.py).
#include "machine.h"

#include <cstdio>
#include <map>

using namespace trmfast::ptx;

namespace {

// Mirrored field by field in tests/ptx_tools.py.
struct CPiece {
  const char* name;
  uint8_t* whole;       // the allocation of which the piece is a part
  uint64_t whole_bytes; // of it
  uint64_t offset, bytes;
  uint64_t bias;    // of the address: its remainder by 256
  uint64_t address; // 0: the executor chooses
  int32_t writable;
  uint32_t writes; // result: how often two bytes of it were written
};

struct CLaunch {
  uint32_t grid[3], threads, shared_bytes;
  const uint8_t* params;
  uint32_t param_bytes;
  CPiece* pieces;
  uint32_t num_pieces;
  int32_t order, blocks_share, truncate_mma;
  uint32_t resident_blocks;
  uint64_t seed;
  uint64_t operations, blocks; // results
};

struct Loaded {
  std::vector<Program> programs;
};

void say(char* message, int32_t capacity, const std::string& text) {
  std::snprintf(message, static_cast<size_t>(capacity), "%s", text.c_str());
}

} // namespace

extern "C" {

// A handle, or null and a message.
void* ptx_load(const char* text, char* message, int32_t capacity) {
  try {
    const Module module = parse(text);
    auto loaded = std::make_unique<Loaded>();
    for (const Entry& entry : module.entries) loaded->programs.push_back(decode(module, entry));
    return loaded.release();
  } catch (const std::exception& error) {
    say(message, capacity, error.what());
    return nullptr;
  }
}

void ptx_free(void* handle) { delete static_cast<Loaded*>(handle); }

uint64_t ptx_base(uint32_t piece, uint64_t bias) { return GlobalMemory::base(piece, bias); }

// The kernels of a module, one a line: name and bytes of parameters.
void ptx_kernels(void* handle, char* text, int32_t capacity) {
  std::string all;
  for (const Program& p : static_cast<Loaded*>(handle)->programs)
    all += p.name + " " + std::to_string(p.param_bytes) + "\n";
  say(text, capacity, all);
}

// All opcodes, one a line.
void ptx_opcodes(char* text, int32_t capacity) {
  std::map<std::string, int> sorted;
  for (const auto& entry : table()) sorted[entry.first] = 0;
  std::string all;
  for (const auto& entry : sorted) all += entry.first + "\n";
  say(text, capacity, all);
}

// 0, or 1 and a message.
int32_t ptx_run(void* handle, const char* kernel, CLaunch* c, char* message, int32_t capacity) {
  try {
    const Program* program = nullptr;
    for (const Program& p : static_cast<Loaded*>(handle)->programs)
      if (p.name == kernel) program = &p;
    if (program == nullptr) throw Fault(std::string("no kernel ") + kernel);
    // Only allocations that are written need cells.
    std::map<const uint8_t*, std::vector<Cell>> cells;
    for (uint32_t i = 0; i < c->num_pieces; ++i)
      if (c->pieces[i].writable) cells[c->pieces[i].whole].resize((c->pieces[i].whole_bytes + 1) / 2);
    GlobalMemory global(c->num_pieces > 0 && c->pieces[0].address != 0);
    for (uint32_t i = 0; i < c->num_pieces; ++i) {
      CPiece& p = c->pieces[i];
      const auto found = cells.find(p.whole);
      global.add({p.name, p.address != 0 ? p.address : GlobalMemory::base(i, p.bias), p.whole + p.offset, p.bytes,
                  p.writable != 0, found == cells.end() ? nullptr : found->second.data() + p.offset / 2, &p.writes});
    }
    Options options;
    options.order = static_cast<Order>(c->order);
    options.seed = c->seed;
    options.resident_blocks = c->resident_blocks;
    options.blocks_share = c->blocks_share != 0;
    options.truncate_mma = c->truncate_mma != 0;
    const Launch launch{
        {c->grid[0], c->grid[1], c->grid[2]}, c->threads, c->shared_bytes, c->params, c->param_bytes, &global};
    const Counts counts = run(*program, launch, options);
    c->operations = counts.operations;
    c->blocks = counts.blocks;
    return 0;
  } catch (const std::exception& error) {
    say(message, capacity, error.what());
    return 1;
  }
}
}
