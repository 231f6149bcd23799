// A kernel decoded once: an array of operations over register indices.
#pragma once

#include "module.h"

#include <unordered_map>

namespace trmfast {
namespace ptx {

constexpr int kLanes = 32;
using Mask = uint32_t; // one bit a lane
constexpr Mask kAll = 0xffffffffu;
constexpr uint32_t kNone = 0xffffffffu;

struct Warp;
struct Op;
using Handler = void (*)(Warp&, const Op&, Mask);

enum class Flow : uint8_t {
  plain,
  collective, // all lanes of the warp execute it together
  masked,     // the lanes that its last operand names execute it together
  branch,
  branch_by_index,
  leave,
  barrier,
  pause, // lets others run
};

struct Op {
  Handler run = nullptr;
  Flow flow = Flow::plain;
  bool negated = false;
  uint8_t num_src = 0;
  uint32_t guard = kNone;
  uint32_t dst[4] = {}, src[12] = {}; // in their files
  int64_t offset[2] = {};             // of the addresses among the operands
  uint32_t target = 0;                // of a branch; by index, the list of targets
};

// One meaning of an opcode.  `operands` has a letter for each, results before `=`: p h r d are registers of 1, 16, 32
// and 64 bits (what is not a result may be a number), S G P addresses of shared and global memory and of parameters,
// L a label, B a list of labels, T the timer.
struct Form {
  const char* operands;
  Handler run;
  Flow flow = Flow::plain;
};
using Table = std::unordered_map<std::string, std::vector<Form>>;

void add_integers(Table&);
void add_floats(Table&);
void add_moves(Table&);
void add_accesses(Table&);
void add_copies(Table&);
void add_matrices(Table&);
void add_collectives(Table&);
void add_control(Table&);

// Registers whose value the machine sets: the same in all lanes, or one a lane.
enum Special : uint32_t {
  tid_x,
  tid_y,
  tid_z,
  ntid_x,
  ntid_y,
  ntid_z,
  ctaid_x,
  ctaid_y,
  ctaid_z,
  nctaid_x,
  nctaid_y,
  nctaid_z,
  laneid,
  num_special
};

struct Program {
  std::string name;
  uint32_t param_bytes = 0, required_threads = 0, static_shared = 0;
  uint32_t predicates = 0, narrow = 0, wide = 0; // sizes of the files; constants come last
  uint32_t special = 0;                          // the first of num_special narrow registers
  std::vector<std::pair<uint32_t, uint64_t>> narrow_constants, wide_constants, predicate_constants;
  std::vector<Op> ops;
  std::vector<std::vector<uint32_t>> lists;
  std::vector<Statement> statements; // one for each
};

Program decode(const Module& module, const Entry& entry);

// All opcodes that have a meaning.
const Table& table();

} // namespace ptx
} // namespace trmfast
