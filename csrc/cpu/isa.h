// Which instruction sets this machine runs, determined once at run time.  The names are those of the compiled targets.
#pragma once

#include <string>
#include <vector>

namespace trmfast {

// nullptr if this machine runs `target`, otherwise the reason in one line.  Accepted are amx, avx512_bf16,
// avx512_vnni, avx512, avx_vnni, avx2, amx_emulated (runs wherever avx2 does) and portable; any other name is reported
// as unknown. The first query for amx requests the tile registers from the kernel, for the whole process.
const char* missing_reason(const std::string& target);

// The targets that this machine runs, best first, portable last.  Never amx_emulated, which is for tests.
std::vector<std::string> supported_targets();

} // namespace trmfast
