// PTX text as statements with resolved registers, ready to be decoded.
#pragma once

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace trmfast {
namespace ptx {

// What the text or the running program did wrong.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The classes of registers; b16 and b32 share a file of 32-bit slots.
enum class Class : uint8_t { predicate, b16, b32, b64 };

struct Operand {
  enum Kind : uint8_t { reg, immediate, name, discard, address };
  Kind kind;
  Class cls = Class::b32;
  uint32_t index = 0;    // of the register; of an address, if `text` is empty
  uint64_t bits = 0;     // of the immediate
  int64_t offset = 0;    // of the address
  std::string text = {}; // the name; of an address without a register, the symbol
};

struct Statement {
  int line;
  std::string text; // as it stood, for messages
  bool guarded = false, negated = false;
  uint32_t guard = 0; // predicate register
  std::string opcode;
  std::vector<Operand> operands; // vectors in braces are flattened
};

struct Entry {
  std::string name;
  std::map<std::string, uint32_t> params; // offsets in the block of parameters
  uint32_t param_bytes = 0;
  uint32_t required_threads = 0;                 // 0: any number
  uint32_t predicates = 0, narrow = 0, wide = 0; // registers declared
  std::vector<Statement> statements;
  std::map<std::string, uint32_t> labels;                // the statement that follows
  std::map<std::string, std::vector<std::string>> lists; // labels that brx.idx branches to
};

struct Module {
  std::map<std::string, uint32_t> shared; // offsets of variables; what has no size starts after the others
  uint32_t static_shared = 0;
  std::vector<Entry> entries;
};

Module parse(const std::string& text);

} // namespace ptx
} // namespace trmfast
