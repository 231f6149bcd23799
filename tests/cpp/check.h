// The C++ test framework: CHECK, and a main function that runs tests by name.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

__attribute__((format(printf, 4, 5), noreturn)) void fail(const char* file, int line, const char* what,
                                                          const char* format, ...) {
  std::fprintf(stderr, "%s:%d: CHECK(%s) ", file, line, what);
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "\n");
  std::_Exit(1);
}

// CHECK(condition) or CHECK(condition, format, arguments...)
#define CHECK(condition, ...)                                                                                          \
  do {                                                                                                                 \
    if (!(condition)) fail(__FILE__, __LINE__, #condition, " " __VA_ARGS__);                                           \
  } while (0)

struct Test {
  const char* name;
  void (*run)();
};

template <int count> int run_test(int argc, char** argv, const Test (&tests)[count]) {
  for (const Test& test : tests) {
    if (argc == 2 && std::strcmp(argv[1], test.name) == 0) {
      test.run();
      return 0;
    }
  }
  std::fprintf(stderr, "usage: %s TEST, one of:", argv[0]);
  for (const Test& test : tests) std::fprintf(stderr, " %s", test.name);
  std::fprintf(stderr, "\n");
  return 2;
}

} // namespace
