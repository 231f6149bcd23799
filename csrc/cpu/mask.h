// Which keys a query sees.
#pragma once

#include "rope.h"

namespace trmfast {
namespace TRMFAST_NAMESPACE {

struct LaneIndex {
  vi lanes;
  LaneIndex() : lanes{} {
    for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  }
};

// Keys begin.. before end.
struct KeyRange {
  int begin, end;
};

// What attention knows of the positions of its tokens.
struct Positions {
  Rope rope;
  const int* segments; // [sequences, L, 2], see Mask; or null

  Positions of(int sequence, int length) const {
    return {rope, segments ? segments + 2L * sequence * length : nullptr};
  }
};

// The mask of one sequence: every query sees one range of keys, itself among them.  With segments, [L, 2], a sequence
// is several in a row: of each token the first position of its own, and the end of a prefix that all of its own see; of
// the rest they see the past.
class Mask {
public:
  Mask(const BlockShape& block, int length, const int* segments)
      : causal_(block.causal), window_(block.window), length_(length), segments_(segments) {}

  // Whether there are keys that a query does not see beside those behind it.
  bool narrow() const { return window_ || segments_; }
  KeyRange seen(int query) const {
    if (segments_) return {segments_[2 * query], larger(segments_[2 * query + 1], query + 1)};
    const int begin = window_ ? larger(0, query - window_ + 1) : 0;
    return {begin, causal_ ? query + 1 : window_ ? smaller(length_, query + window_) : length_};
  }
  // The end of what any of n queries sees.
  int end(int query, int n) const {
    int end = seen(query + n - 1).end;
    for (int i = query; segments_ && i < query + n; ++i) end = larger(end, seen(i).end);
    return end;
  }
  // What any of n queries sees, in whole panels of keys.
  KeyRange tile(int query, int n) const {
    return {seen(query).begin / kPanel * kPanel, round_up(end(query, n), kPanel)};
  }

private:
  bool causal_;
  int window_, length_;
  const int* segments_;
};

} // namespace TRMFAST_NAMESPACE
} // namespace trmfast
