#include "monitor.h"

namespace trmfast {
namespace {

using std::chrono::milliseconds;

constexpr milliseconds kInterval(50);
// Read the clock once per this many checks, or at every check if they are far apart.
constexpr int kChecks = 16;
constexpr milliseconds kFarApart(1);

} // namespace

Monitor::Monitor(Stop stop, Phase phase, void* context)
    : stop_(stop), phase_(phase), context_(context), checks_left_(kChecks),
      last_look_(std::chrono::steady_clock::now()), last_asked_(last_look_), stopped_(false), called_out_(false) {}

bool Monitor::stopped(bool caller) {
  if (caller && --checks_left_ <= 0) ask();
  return stopped_.load(std::memory_order_relaxed);
}

void Monitor::ask() {
  const auto now = std::chrono::steady_clock::now();
  checks_left_ = now - last_look_ < kFarApart ? kChecks : 1;
  last_look_ = now;
  if (now - last_asked_ < kInterval) return;
  called_out_ = true;
  if (stop_(context_)) stopped_.store(true, std::memory_order_relaxed);
  last_look_ = last_asked_ = std::chrono::steady_clock::now();
}

void Monitor::begin_phase(const char* name) {
  if (!phase_) return;
  called_out_ = true;
  phase_(context_, name);
}

bool Monitor::called_out() {
  const bool called = called_out_;
  called_out_ = false;
  return called;
}

void Monitor::end() { begin_phase(nullptr); }

} // namespace trmfast
