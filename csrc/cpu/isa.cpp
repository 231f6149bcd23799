#include "isa.h"

#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace trmfast {
namespace {

// One reason per target, nullptr where it runs.
struct Reasons {
  const char* avx2 = "avx2 needs an x86-64 processor";
  const char* avx_vnni = "avx_vnni needs an x86-64 processor";
  const char* avx512 = "avx512 needs an x86-64 processor";
  const char* avx512_vnni = "avx512_vnni needs an x86-64 processor";
  const char* avx512_bf16 = "avx512_bf16 needs an x86-64 processor";
  const char* amx = "amx needs an x86-64 processor";
};

#if defined(__x86_64__)

bool bit(uint32_t word, int index) { return (word >> index) & 1u; }

// The register states that the operating system saves on a context switch.
uint64_t enabled_states() {
  uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

// Linux grants the 8 KiB of tile registers only on request.
const char* request_amx() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023; // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;              // XFEATURE_XTILEDATA
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0) return nullptr;
  return "amx: the kernel refused the tile registers (arch_prctl ARCH_REQ_XCOMP_PERM; Linux 5.16 or newer is needed)";
#else
  return "amx: the tile registers are requested on Linux only";
#endif
}

Reasons detect() {
  constexpr uint64_t kAvxStates = 0x6;     // SSE and AVX
  constexpr uint64_t kAvx512States = 0xe6; // and opmask, upper halves, registers 16 to 31
  constexpr uint64_t kAmxStates = 0x60000; // tile configuration and tile data

  Reasons reasons;
  uint32_t a = 0, b = 0, c = 0, d = 0;
  const bool has_leaf1 = __get_cpuid(1, &a, &b, &c, &d) != 0;
  const bool vex = has_leaf1 && bit(c, 12) && bit(c, 28) && bit(c, 29);   // FMA, AVX, F16C
  const uint64_t states = has_leaf1 && bit(c, 27) ? enabled_states() : 0; // OSXSAVE: xgetbv exists

  // Every processor with AVX-512 BF16 has AVX-512 VNNI, every one with AMX-BF16 has AMX-INT8; both are asked for here,
  // since a hypervisor may hide one.
  uint32_t b7 = 0, c7 = 0, d7 = 0, most = 0, a71 = 0;
  __get_cpuid_count(7, 0, &most, &b7, &c7, &d7);
  if (most >= 1) __get_cpuid_count(7, 1, &a71, &b, &c, &d);

  if (!vex || !bit(b7, 5)) {
    reasons.avx2 = "avx2: the processor lacks AVX2, FMA or F16C";
  } else if ((states & kAvxStates) != kAvxStates) {
    reasons.avx2 = "avx2: the operating system does not save the AVX registers";
  } else {
    reasons.avx2 = nullptr;
  }

  if (reasons.avx2 != nullptr)
    reasons.avx_vnni = "avx_vnni: avx2 does not run here";
  else
    reasons.avx_vnni = bit(a71, 4) ? nullptr : "avx_vnni: the processor lacks AVX-VNNI";

  const bool avx512 = bit(b7, 16) && bit(b7, 17) && bit(b7, 30) && bit(b7, 31); // F, DQ, BW, VL
  if (reasons.avx2 != nullptr || !avx512) {
    reasons.avx512 = "avx512: the processor lacks AVX-512 F, BW, DQ or VL";
  } else if ((states & kAvx512States) != kAvx512States) {
    reasons.avx512 = "avx512: the operating system does not save the AVX-512 registers";
  } else {
    reasons.avx512 = nullptr;
  }

  if (reasons.avx512 != nullptr) {
    reasons.avx512_vnni = "avx512_vnni: avx512 does not run here";
  } else {
    reasons.avx512_vnni = bit(c7, 11) ? nullptr : "avx512_vnni: the processor lacks AVX-512 VNNI";
  }

  if (reasons.avx512_vnni != nullptr) {
    reasons.avx512_bf16 = "avx512_bf16: avx512_vnni does not run here";
  } else {
    reasons.avx512_bf16 = bit(a71, 5) ? nullptr : "avx512_bf16: the processor lacks AVX-512 BF16";
  }

  if (reasons.avx512_bf16 != nullptr) {
    reasons.amx = "amx: avx512_bf16 does not run here";
  } else if (!bit(d7, 24) || !bit(d7, 22) || !bit(d7, 25)) {
    reasons.amx = "amx: the processor lacks AMX-TILE, AMX-BF16 or AMX-INT8";
  } else if ((states & kAmxStates) != kAmxStates) {
    reasons.amx = "amx: the operating system does not save the tile registers";
  } else {
    reasons.amx = nullptr;
  }
  return reasons;
}

#else

const char* request_amx() { return Reasons().amx; }
Reasons detect() { return Reasons(); }

#endif

const Reasons& reasons() {
  static const Reasons detected = detect();
  return detected;
}

} // namespace

const char* missing_reason(const std::string& target) {
  if (target == "portable") return nullptr;
  if (target == "avx2" || target == "amx_emulated") return reasons().avx2;
  if (target == "avx_vnni") return reasons().avx_vnni;
  if (target == "avx512") return reasons().avx512;
  if (target == "avx512_vnni") return reasons().avx512_vnni;
  if (target == "avx512_bf16") return reasons().avx512_bf16;
  if (target == "amx") {
    static const char* const reason = reasons().amx ? reasons().amx : request_amx();
    return reason;
  }
  return "unknown target, accepted are amx, avx512_bf16, avx512_vnni, avx512, avx_vnni, avx2, amx_emulated, portable";
}

std::vector<std::string> supported_targets() {
  std::vector<std::string> supported;
  for (const char* target : {"amx", "avx512_bf16", "avx512_vnni", "avx512", "avx_vnni", "avx2", "portable"}) {
    if (missing_reason(target) == nullptr) supported.emplace_back(target);
  }
  return supported;
}

} // namespace trmfast
