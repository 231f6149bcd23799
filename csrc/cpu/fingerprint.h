// A fingerprint of weights, to detect changes since they were packed.
#pragma once

#include <cstdint>
#include <vector>

namespace trmfast {

// Fingerprints the bytes of several arrays; the result is the same for any number of threads.  A change within one
// aligned 8-byte word always changes it; any other non-adversarial change goes unseen with probability 2^-64.
uint64_t fingerprint(const std::vector<const char*>& arrays, const std::vector<int64_t>& sizes, int threads);

} // namespace trmfast
