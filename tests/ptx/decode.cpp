// Statements become operations: operands are checked against the forms of the opcode, numbers become registers.
#include "program.h"

#include "memory.h"

#include <cstring>

namespace trmfast {
namespace ptx {

const Table& table() {
  static const Table made = [] {
    Table t;
    add_integers(t);
    add_floats(t);
    add_moves(t);
    add_accesses(t);
    add_copies(t);
    add_matrices(t);
    add_collectives(t);
    add_control(t);
    return t;
  }();
  return made;
}

namespace {

constexpr const char* kSpecial[num_special] = {"%tid.x",    "%tid.y",    "%tid.z",   "%ntid.x",  "%ntid.y",
                                               "%ntid.z",   "%ctaid.x",  "%ctaid.y", "%ctaid.z", "%nctaid.x",
                                               "%nctaid.y", "%nctaid.z", "%laneid"};

class Decoder {
public:
  Decoder(const Module& module, const Entry& entry) : module_(module), entry_(entry) {
    program_.name = entry.name;
    program_.param_bytes = entry.param_bytes;
    program_.required_threads = entry.required_threads;
    program_.static_shared = module.static_shared;
    // One more of each kind than declared: what is discarded goes there.
    program_.predicates = entry.predicates + 1;
    program_.special = entry.narrow + 1;
    program_.narrow = program_.special + num_special;
    program_.wide = entry.wide + 1;
  }

  Program run() {
    for (const Statement& s : entry_.statements) program_.ops.push_back(decode(s));
    // Running past the end leaves the kernel.
    Op end;
    end.flow = Flow::leave;
    program_.ops.push_back(end);
    program_.statements = entry_.statements;
    program_.statements.push_back({0, "end of the kernel", false, false, 0, "", {}});
    return std::move(program_);
  }

private:
  Op decode(const Statement& s) {
    const auto found = table().find(s.opcode);
    if (found == table().end()) fail(s, "no such instruction here: " + s.opcode);
    for (const Form& form : found->second) {
      Op op;
      if (!fill(s, form, op)) continue;
      op.run = form.run;
      op.flow = form.flow;
      op.negated = s.negated;
      if (s.guarded) op.guard = s.guard;
      return op;
    }
    std::string accepted;
    for (const Form& form : found->second) accepted += std::string(" ") + form.operands;
    fail(s, "operands are not of" + accepted);
  }

  bool fill(const Statement& s, const Form& form, Op& op) {
    const size_t results = static_cast<size_t>(std::strchr(form.operands, '=') - form.operands);
    if (s.operands.size() + 1 != std::strlen(form.operands)) return false;
    size_t address = 0;
    for (size_t i = 0; i < s.operands.size(); ++i) {
      const Operand& operand = s.operands[i];
      const bool is_result = i < results;
      const char letter = form.operands[is_result ? i : i + 1];
      uint32_t& slot = is_result ? op.dst[i] : op.src[i - results];
      if (!is_result) op.num_src = static_cast<uint8_t>(i - results + 1);
      if (letter == 'T') {
        if (operand.text != "%globaltimer") return false;
      } else if (letter == 'L') {
        op.target = label(s, operand.kind == Operand::name ? operand.text : "");
      } else if (letter == 'B') {
        const auto list = entry_.lists.find(operand.text);
        if (list == entry_.lists.end()) fail(s, "no list of labels " + operand.text);
        op.target = static_cast<uint32_t>(program_.lists.size());
        program_.lists.emplace_back();
        for (const std::string& name : list->second) program_.lists.back().push_back(label(s, name));
      } else if (letter == 'S' || letter == 'G' || letter == 'P') {
        if (operand.kind != Operand::address) return false;
        op.offset[address++] = operand.offset;
        if (!operand.text.empty())
          slot = symbol(s, operand.text, letter == 'S' ? Class::b32 : Class::b64, letter == 'P');
        else if (operand.cls == (letter == 'S' ? Class::b32 : Class::b64))
          slot = operand.index;
        else
          return false;
      } else {
        const Class cls = letter == 'p'   ? Class::predicate
                          : letter == 'h' ? Class::b16
                          : letter == 'r' ? Class::b32
                                          : Class::b64;
        if (!simple(s, operand, cls, is_result, slot)) return false;
      }
    }
    return true;
  }

  uint32_t label(const Statement& s, const std::string& name) const {
    const auto found = entry_.labels.find(name);
    if (found == entry_.labels.end()) fail(s, "no label " + name);
    return found->second;
  }

  bool simple(const Statement& s, const Operand& operand, Class cls, bool is_result, uint32_t& slot) {
    switch (operand.kind) {
    case Operand::reg:
      slot = operand.index;
      return operand.cls == cls;
    case Operand::discard:
      if (!is_result) return false;
      slot = cls == Class::predicate ? entry_.predicates : cls == Class::b64 ? entry_.wide : entry_.narrow;
      return true;
    case Operand::immediate:
      if (is_result) return false;
      slot = constant(cls, operand.bits);
      return true;
    case Operand::name:
      if (is_result || cls == Class::predicate || cls == Class::b16) return false;
      for (uint32_t i = 0; i < num_special; ++i)
        if (operand.text == kSpecial[i]) {
          slot = program_.special + i;
          return cls == Class::b32;
        }
      if (operand.text[0] == '%') return false;
      slot = symbol(s, operand.text, cls, entry_.params.count(operand.text) != 0);
      return true;
    default:
      return false;
    }
  }

  // The address of a shared variable or the offset of a parameter.
  uint32_t symbol(const Statement& s, const std::string& name, Class cls, bool is_param) {
    const auto& known = is_param ? entry_.params : module_.shared;
    const auto found = known.find(name);
    if (found == known.end()) fail(s, "no variable " + name + " that is supported here");
    return constant(cls, is_param ? found->second : found->second + kSharedBase);
  }

  uint32_t constant(Class cls, uint64_t bits) {
    if (cls == Class::b16) bits &= 0xffff;
    if (cls == Class::b32) bits &= 0xffffffff;
    auto& constants = cls == Class::predicate ? program_.predicate_constants
                      : cls == Class::b64     ? program_.wide_constants
                                              : program_.narrow_constants;
    uint32_t& used = cls == Class::predicate ? program_.predicates
                     : cls == Class::b64     ? program_.wide
                                             : program_.narrow;
    for (const auto& known : constants)
      if (known.second == bits) return known.first;
    constants.emplace_back(used, bits);
    return used++;
  }

  [[noreturn]] void fail(const Statement& s, const std::string& what) const {
    throw Fault(entry_.name + ", line " + std::to_string(s.line) + ", `" + s.text + "`: " + what);
  }

  const Module& module_;
  const Entry& entry_;
  Program program_;
};

} // namespace

Program decode(const Module& module, const Entry& entry) { return Decoder(module, entry).run(); }

} // namespace ptx
} // namespace trmfast
