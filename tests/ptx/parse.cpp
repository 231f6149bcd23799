// The parser: the part of PTX's grammar that Triton and nvcc use for kernels without functions.
#include "module.h"

#include <cctype>
#include <cstdlib>
#include <sstream>

namespace trmfast {
namespace ptx {
namespace {

// Comments become spaces, lines with debugging information become empty; line numbers stay.
std::string strip(const std::string& text) {
  std::string out = text;
  for (size_t i = 0; i + 1 < out.size(); ++i) {
    if (out[i] == '/' && out[i + 1] == '/') {
      while (i < out.size() && out[i] != '\n') out[i++] = ' ';
    } else if (out[i] == '/' && out[i + 1] == '*') {
      const size_t end = out.find("*/", i + 2);
      if (end == std::string::npos) throw Fault("a comment has no end");
      for (; i < end + 2; ++i)
        if (out[i] != '\n') out[i] = ' ';
    }
  }
  std::istringstream lines(out);
  std::string line, kept;
  while (std::getline(lines, line)) {
    const size_t first = line.find_first_not_of(" \t");
    const bool debug =
        first != std::string::npos && (line.compare(first, 5, ".loc\t") == 0 || line.compare(first, 5, ".loc ") == 0 ||
                                       line.compare(first, 6, ".file\t") == 0 || line.compare(first, 6, ".file ") == 0);
    kept += (debug ? "" : line) + "\n";
  }
  return kept;
}

std::string trim(const std::string& text) {
  const size_t first = text.find_first_not_of(" \t\r\n"), last = text.find_last_not_of(" \t\r\n");
  return first == std::string::npos ? "" : text.substr(first, last - first + 1);
}

std::vector<std::string> words(const std::string& text) {
  std::istringstream stream(text);
  std::vector<std::string> found;
  for (std::string word; stream >> word;) found.push_back(word);
  return found;
}

// Splits at commas outside of braces and brackets.
std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> found;
  int depth = 0;
  std::string one;
  for (const char c : text) {
    depth += (c == '{' || c == '[') - (c == '}' || c == ']');
    if (c == ',' && depth == 0) {
      found.push_back(trim(one));
      one.clear();
    } else {
      one += c;
    }
  }
  if (!trim(one).empty()) found.push_back(trim(one));
  return found;
}

uint32_t bytes_of(const std::string& type) {
  const std::string digits = type.substr(
      type.find_first_of("0123456789") == std::string::npos ? type.size() : type.find_first_of("0123456789"));
  const int bits = std::atoi(digits.c_str());
  if (bits != 8 && bits != 16 && bits != 32 && bits != 64) throw Fault("type " + type + " is not supported");
  return static_cast<uint32_t>(bits) / 8;
}

uint32_t aligned(uint32_t offset, uint32_t to) { return (offset + to - 1) / to * to; }

class Parser {
public:
  explicit Parser(const std::string& text) : text_(strip(text)) {}

  Module run() {
    std::vector<std::string> dynamic; // shared variables without a size
    for (skip(); at_ < text_.size(); skip()) {
      const std::string word = peek_word();
      if (word == ".version" || word == ".target" || word == ".address_size") {
        at_ = text_.find('\n', at_);
      } else if (word == ".section") {
        at_ = text_.find('{', at_);
        until('}');
      } else if (word == ".visible" || word == ".entry" || word == ".weak") {
        until_word(".entry");
        module_.entries.push_back(entry());
      } else if (word == ".extern" || word == ".shared" || word == ".global" || word == ".const") {
        variable(until(';'), dynamic);
      } else {
        fail("`" + word + "` is not supported outside of kernels");
      }
    }
    for (const auto& name : dynamic) module_.shared[name] = aligned(module_.static_shared, 1024);
    return std::move(module_);
  }

private:
  struct Declared {
    Class cls;
    uint32_t first, count; // a single register has count 0
  };
  using Scope = std::map<std::string, Declared>;

  [[noreturn]] void fail(const std::string& what) const { throw Fault("line " + std::to_string(line()) + ": " + what); }

  // The line of the current place, which only moves forward.
  int line() const {
    for (; counted_ < at_ && counted_ < text_.size(); ++counted_) line_ += text_[counted_] == '\n';
    return line_;
  }

  void skip() {
    while (at_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[at_]))) ++at_;
  }

  std::string peek_word() const {
    size_t end = at_;
    while (end < text_.size() && !std::isspace(static_cast<unsigned char>(text_[end])) &&
           std::string("(){};,").find(text_[end]) == std::string::npos)
      ++end;
    return text_.substr(at_, end - at_);
  }

  // What comes before the character, which is passed.
  std::string until(char c) {
    const size_t end = text_.find(c, at_);
    if (end == std::string::npos) fail(std::string("no `") + c + "` follows");
    const std::string found = text_.substr(at_, end - at_);
    at_ = end + 1;
    return found;
  }

  void until_word(const std::string& word) {
    const size_t end = text_.find(word, at_);
    if (end == std::string::npos) fail("no `" + word + "` follows");
    at_ = end + word.size();
  }

  void variable(const std::string& declaration, std::vector<std::string>& dynamic) {
    if (declaration.find(".shared") == std::string::npos) return; // an error where it is used
    uint32_t align = 1, size = 1;
    const auto found = words(declaration);
    for (size_t i = 0; i + 1 < found.size(); ++i)
      if (found[i] == ".align") align = static_cast<uint32_t>(std::atoi(found[i + 1].c_str()));
    std::string name = found.back();
    const size_t bracket = name.find('[');
    if (bracket != std::string::npos) {
      size = static_cast<uint32_t>(std::atoi(name.c_str() + bracket + 1));
      name = name.substr(0, bracket);
    }
    if (size == 0) {
      dynamic.push_back(name);
      return;
    }
    module_.static_shared = aligned(module_.static_shared, align);
    module_.shared[name] = module_.static_shared;
    module_.static_shared += size * bytes_of(found[found.size() - 2]);
  }

  Entry entry() {
    entry_ = {};
    entry_.name = trim(until('('));
    for (const std::string& param : split(until(')'))) parameter(words(param));
    const auto directives = words(until('{'));
    for (size_t i = 0; i + 1 < directives.size(); ++i)
      if (directives[i] == ".reqntid")
        entry_.required_threads = static_cast<uint32_t>(std::atoi(directives[i + 1].c_str()));
    scopes_.assign(1, {});
    while (!scopes_.empty()) {
      skip();
      if (at_ >= text_.size()) fail("kernel " + entry_.name + " has no end");
      const char c = text_[at_];
      if (c == '{') {
        scopes_.emplace_back();
        ++at_;
      } else if (c == '}') {
        scopes_.pop_back();
        ++at_;
      } else if (c == '.') {
        declaration(until(';'));
      } else if (!label()) {
        statement();
      }
    }
    return std::move(entry_);
  }

  void parameter(const std::vector<std::string>& found) {
    uint32_t size = 0, align = 0, count = 1;
    for (size_t i = 1; i + 1 < found.size(); ++i) {
      if (found[i] == ".ptr") break; // what follows describes the pointer's target
      if (found[i] == ".align")
        align = static_cast<uint32_t>(std::atoi(found[++i].c_str()));
      else
        size = bytes_of(found[i]);
    }
    std::string name = found.back();
    const size_t bracket = name.find('[');
    if (bracket != std::string::npos) {
      count = static_cast<uint32_t>(std::atoi(name.c_str() + bracket + 1));
      name = name.substr(0, bracket);
    }
    if (size == 0) fail("parameter " + name + " has no type");
    entry_.param_bytes = aligned(entry_.param_bytes, align ? align : size);
    entry_.params[name] = entry_.param_bytes;
    entry_.param_bytes += size * count;
  }

  void declaration(const std::string& text) {
    const auto found = words(text);
    if (found[0] == ".pragma") return;
    if (found[0] == ".branchtargets") {
      entry_.lists[label_] = split(text.substr(found[0].size()));
      return;
    }
    if (found[0] != ".reg" || found.size() < 3) fail("`" + trim(text) + "` is not supported");
    const Class cls = found[1] == ".pred"       ? Class::predicate
                      : bytes_of(found[1]) == 2 ? Class::b16
                      : bytes_of(found[1]) == 4 ? Class::b32
                      : bytes_of(found[1]) == 8 ? Class::b64
                                                : throw Fault("registers of " + found[1] + " are not supported");
    for (std::string name : split(text.substr(text.find(found[1]) + found[1].size()))) {
      uint32_t count = 0;
      const size_t bracket = name.find('<');
      if (bracket != std::string::npos) {
        count = static_cast<uint32_t>(std::atoi(name.c_str() + bracket + 1));
        name = name.substr(0, bracket);
      }
      uint32_t& used = cls == Class::predicate ? entry_.predicates : cls == Class::b64 ? entry_.wide : entry_.narrow;
      scopes_.back()[name] = {cls, used, count};
      used += count ? count : 1;
    }
  }

  bool label() {
    size_t end = at_;
    while (end < text_.size() &&
           (std::isalnum(static_cast<unsigned char>(text_[end])) || text_[end] == '_' || text_[end] == '$'))
      ++end;
    if (end == at_ || end >= text_.size() || text_[end] != ':') return false;
    label_ = text_.substr(at_, end - at_);
    entry_.labels[label_] = static_cast<uint32_t>(entry_.statements.size());
    at_ = end + 1;
    return true;
  }

  void statement() {
    Statement s;
    s.line = line();
    std::string rest = trim(until(';'));
    s.text = rest;
    for (char& c : s.text)
      if (std::isspace(static_cast<unsigned char>(c))) c = ' ';
    if (rest[0] == '@') {
      s.guarded = true;
      s.negated = rest[1] == '!';
      const size_t begin = 1 + s.negated, end = rest.find_first_of(" \t", begin);
      const Operand guard = operand(rest.substr(begin, end - begin));
      if (guard.kind != Operand::reg || guard.cls != Class::predicate) fail("`" + s.text + "`: no predicate guards it");
      s.guard = guard.index;
      rest = trim(rest.substr(end));
    }
    const size_t end = rest.find_first_of(" \t\n");
    s.opcode = rest.substr(0, end);
    if (end != std::string::npos)
      for (const std::string& one : split(rest.substr(end))) flatten(one, s.operands);
    entry_.statements.push_back(std::move(s));
  }

  void flatten(const std::string& text, std::vector<Operand>& out) {
    const size_t bar = text.find('|');
    if (text[0] == '{') {
      for (const std::string& one : split(text.substr(1, text.size() - 2))) out.push_back(operand(one));
    } else if (bar != std::string::npos) {
      out.push_back(operand(trim(text.substr(0, bar))));
      out.push_back(operand(trim(text.substr(bar + 1))));
    } else {
      out.push_back(operand(text));
    }
  }

  Operand operand(const std::string& text) {
    if (text == "_") return {Operand::discard};
    if (text[0] == '[') return address(trim(text.substr(1, text.size() - 2)));
    if (text[0] == '%') {
      Operand found{Operand::reg};
      if (find(text, found)) return found;
    }
    if (std::isdigit(static_cast<unsigned char>(text[0])) || text[0] == '-') {
      Operand found{Operand::immediate};
      found.bits = number(text);
      return found;
    }
    if (text[0] == '!') fail("`" + text + "`: negated operands are not supported");
    Operand found{Operand::reg};
    if (find(text, found)) return found;
    return {Operand::name, Class::b32, 0, 0, 0, text};
  }

  Operand address(const std::string& text) {
    const size_t plus = text.find('+');
    const Operand base = operand(trim(text.substr(0, plus)));
    Operand found{Operand::address, base.cls, base.index, 0, 0, base.text};
    if (plus != std::string::npos) found.offset = static_cast<int64_t>(number(trim(text.substr(plus + 1))));
    if (base.kind == Operand::immediate || base.kind == Operand::discard) fail("`[" + text + "]`: an absolute address");
    return found;
  }

  bool find(const std::string& name, Operand& found) const {
    const size_t digits = name.find_last_not_of("0123456789") + 1;
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      const auto exact = scope->find(name);
      if (exact != scope->end() && exact->second.count == 0) {
        found.cls = exact->second.cls;
        found.index = exact->second.first;
        return true;
      }
      const auto many = scope->find(name.substr(0, digits));
      if (digits < name.size() && many != scope->end()) {
        const uint32_t number = static_cast<uint32_t>(std::atoi(name.c_str() + digits));
        if (number >= many->second.count) continue;
        found.cls = many->second.cls;
        found.index = many->second.first + number;
        return true;
      }
    }
    return false;
  }

  // Integers, and floating-point numbers by their bits: 0f3F800000, 0d3FF0000000000000.
  uint64_t number(const std::string& text) const {
    const bool bits = text.size() > 2 && text[0] == '0' && (text[1] == 'f' || text[1] == 'd') &&
                      (text.size() == 10 || text.size() == 18);
    const std::string digits = bits ? text.substr(2) : text;
    char* end = nullptr;
    const uint64_t found = digits[0] == '-' ? static_cast<uint64_t>(std::strtoll(digits.c_str(), &end, 0))
                                            : std::strtoull(digits.c_str(), &end, bits ? 16 : 0);
    if (*end == 'U') ++end;
    if (*end != 0) fail("`" + text + "` is no number");
    return found;
  }

  std::string text_;
  size_t at_ = 0;
  mutable size_t counted_ = 0;
  mutable int line_ = 1;
  Module module_;
  Entry entry_;
  std::string label_; // the last one
  std::vector<Scope> scopes_;
};

} // namespace

Module parse(const std::string& text) { return Parser(text).run(); }

} // namespace ptx
} // namespace trmfast
