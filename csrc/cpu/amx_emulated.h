// The AMX tile intrinsics that trmfast uses, in plain C++, so that AMX code runs and is tested on any
// machine. Include after <immintrin.h>: the names are macros with literal tile numbers, as GCC's are.
//
// TDPBF16PS follows Intel's description bit for bit: per instruction, the even and the odd depths are summed in two
// fp32 accumulators that start at zero (fused multiply-adds, round to nearest even), then added to each other and to
// the destination; denormals are zero on the way in and out. Where the hardware raises #UD or #GP, this aborts with a
// message. It is also stricter: a load into a tile takes all its configured rows, and tiles that were never written are
// NaN.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace trmfast {
namespace amx_emulated {

constexpr int kTiles = 8, kMaxRows = 16, kMaxColumnBytes = 64;

// The operand of LDTILECFG, palette 1.
struct Config {
  uint8_t palette;
  uint8_t start_row;
  uint8_t reserved[14];
  uint16_t column_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(Config) == 64, "LDTILECFG reads 64 bytes");

struct State {
  bool configured = false;
  Config config;
  uint32_t tile[kTiles][kMaxRows][kMaxColumnBytes / 4];
  long config_loads = 0;
};

inline State& state() {
  static thread_local State s;
  return s;
}

inline void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "AMX emulation: %s\n", what);
  std::abort();
}

// The configured rows of a tile, and bytes per row.
inline int rows(int t) {
  State& s = state();
  require(s.configured, "a tile instruction without a configuration (#UD)");
  require(t >= 0 && t < kTiles, "there are eight tiles");
  require(s.config.rows[t] > 0, "the tile is not configured (#UD)");
  return s.config.rows[t];
}

inline int column_bytes(int t) { return rows(t) > 0 ? state().config.column_bytes[t] : 0; }

inline void load_config(const void* p) {
  State& s = state();
  std::memcpy(&s.config, p, sizeof s.config);
  ++s.config_loads;
  const Config& c = s.config;
  if (c.palette == 0) {
    s.configured = false;
    return;
  }
  require(c.palette == 1, "unknown palette (#GP)");
  require(c.start_row == 0, "a start row other than 0 is for interrupted loads");
  for (uint8_t byte : c.reserved) require(byte == 0, "reserved bytes of the configuration are not zero (#GP)");
  for (int t = 0; t < 16; ++t) {
    require(t < kTiles || (c.rows[t] == 0 && c.column_bytes[t] == 0), "the configuration names a tile above 7 (#GP)");
    require(c.rows[t] <= kMaxRows, "a tile has more than 16 rows (#GP)");
    require(c.column_bytes[t] <= kMaxColumnBytes, "a tile row has more than 64 bytes (#GP)");
    require((c.rows[t] == 0) == (c.column_bytes[t] == 0), "a tile has rows or columns, but not both (#GP)");
  }
  s.configured = true;
  std::memset(s.tile, 0xff, sizeof s.tile); // the hardware zeroes them; NaN exposes code that relies on it
}

inline void release() { state().configured = false; }

inline void zero(int t) {
  rows(t);
  std::memset(state().tile[t], 0, sizeof state().tile[t]);
}

inline void load(int t, const void* base, long stride) {
  const int r = rows(t), bytes = column_bytes(t);
  zero(t);
  for (int i = 0; i < r; ++i) std::memcpy(state().tile[t][i], static_cast<const char*>(base) + i * stride, bytes);
}

inline void store(int t, void* base, long stride) {
  const int r = rows(t), bytes = column_bytes(t);
  for (int i = 0; i < r; ++i) std::memcpy(static_cast<char*>(base) + i * stride, state().tile[t][i], bytes);
}

inline float flush_denormal(float x) { return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0.0f, x) : x; }

// The half of a dword of two bf16: 0 is the low one.
inline float half(uint32_t pair, int which) {
  const uint32_t bits = which == 0 ? pair << 16 : pair & 0xffff0000u;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return flush_denormal(x);
}

struct Product {
  int rows, columns, depth; // in dwords
};

inline Product checked_product(int c, int a, int b) {
  require(c != a && c != b && a != b, "the three tiles of a product must differ (#UD)");
  const Product p{rows(c), column_bytes(c) / 4, column_bytes(a) / 4};
  require(rows(a) == p.rows, "product: rows of the destination and of the first operand differ (#UD)");
  require(column_bytes(b) == column_bytes(c),
          "product: columns of the destination and of the second operand differ (#UD)");
  require(rows(b) == p.depth, "product: depths of the operands differ (#UD)");
  require(column_bytes(c) % 4 == 0 && column_bytes(a) % 4 == 0, "product: rows that are not whole dwords (#UD)");
  return p;
}

inline void dot_product_bf16(int c, int a, int b) {
  State& s = state();
  const Product p = checked_product(c, a, b);
  for (int i = 0; i < p.rows; ++i) {
    for (int j = 0; j < p.columns; ++j) {
      float sum[2] = {0, 0};
      for (int l = 0; l < p.depth; ++l) {
        for (int w = 0; w < 2; ++w) {
          sum[w] = flush_denormal(__builtin_fmaf(half(s.tile[a][i][l], w), half(s.tile[b][l][j], w), sum[w]));
        }
      }
      float old;
      std::memcpy(&old, &s.tile[c][i][j], sizeof old);
      const float result = flush_denormal(flush_denormal(old) + flush_denormal(sum[0] + sum[1]));
      std::memcpy(&s.tile[c][i][j], &result, sizeof result);
    }
  }
}

// TDPBUSD: unsigned bytes of a times signed bytes of b, in 32-bit integers that wrap around.
inline void dot_product_u8s8(int c, int a, int b) {
  State& s = state();
  const Product p = checked_product(c, a, b);
  for (int i = 0; i < p.rows; ++i) {
    for (int j = 0; j < p.columns; ++j) {
      for (int l = 0; l < p.depth; ++l) {
        for (int byte = 0; byte < 32; byte += 8) {
          const int x = static_cast<uint8_t>(s.tile[a][i][l] >> byte), y = static_cast<int8_t>(s.tile[b][l][j] >> byte);
          s.tile[c][i][j] += static_cast<uint32_t>(x * y);
        }
      }
    }
  }
}

} // namespace amx_emulated
} // namespace trmfast

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbusd
#define _tile_loadconfig(p) ::trmfast::amx_emulated::load_config(p)
#define _tile_release() ::trmfast::amx_emulated::release()
#define _tile_zero(t) ::trmfast::amx_emulated::zero(t)
#define _tile_loadd(t, base, stride) ::trmfast::amx_emulated::load(t, base, stride)
#define _tile_stream_loadd(t, base, stride) ::trmfast::amx_emulated::load(t, base, stride)
#define _tile_stored(t, base, stride) ::trmfast::amx_emulated::store(t, base, stride)
#define _tile_dpbf16ps(c, a, b) ::trmfast::amx_emulated::dot_product_bf16(c, a, b)
#define _tile_dpbusd(c, a, b) ::trmfast::amx_emulated::dot_product_u8s8(c, a, b)
