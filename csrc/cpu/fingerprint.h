// A fingerprint of weights: how the engine knows that they are still those that it packed.
#pragma once

#include <cstdint>
#include <vector>

namespace trmfast {

// Of the bytes of many arrays, the same for any number of threads.  It is certain to change when bytes of a single
// aligned word of 8 change; a change of more words that is not made to go unseen does so with a probability of 2^-64.
uint64_t fingerprint(const std::vector<const char*>& arrays, const std::vector<int64_t>& sizes, int threads);

} // namespace trmfast
