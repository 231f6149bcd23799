// Building blocks of the emulator's test cases.
#pragma once

#include <cstdio>
#include <functional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "simt.h"

namespace trmfast {
namespace simt_test {

struct Case {
  const char* name;
  void (*run)();
};

extern const std::vector<Case> kMisuse; // test_misuse.cpp

inline void check(bool condition, const std::string& what) {
  if (!condition) throw std::runtime_error(what);
}

// The launch must fail with an error that contains `what` (alternatives separated by |) and names a line of `file`.
inline void expect_error(const std::string& what, const std::function<void()>& body,
                         const std::string& file = "examples.cuh:") {
  try {
    body();
  } catch (const simt::Error& error) {
    const std::string text = error.what();
    std::printf("  %s\n", text.c_str());
    std::istringstream alternatives(what);
    std::string one;
    bool found = false;
    while (std::getline(alternatives, one, '|')) found |= text.find(one) != std::string::npos;
    check(found, "the error is not about '" + what + "'");
    check(text.find(file) != std::string::npos, "the error names no line of " + file);
    return;
  }
  throw std::runtime_error("the bug went unnoticed; an error about '" + what + "' was expected");
}

inline std::vector<simt::Options> schedules(int resident_blocks = 1) {
  std::vector<simt::Options> all(5);
  all[1].order = simt::Order::kReverse;
  for (size_t i = 2; i < all.size(); ++i) {
    all[i].order = simt::Order::kRandom;
    all[i].seed = i;
  }
  for (simt::Options& options : all) options.resident_blocks = resident_blocks;
  return all;
}

} // namespace simt_test
} // namespace trmfast
