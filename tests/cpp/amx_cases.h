// Tests of dot_amx.h on emulated tiles, and of the emulation.
#pragma once

#ifdef TRMFAST_EMULATE_AMX

#include <cmath>
#include <thread>
#include <vector>

#include "numbers.h"

namespace {

long config_loads() { return amx_emulated::state().config_loads; }

void run_rows(int rows) {
  const Operands<bf16> in(rows, 32, 0);
  std::vector<float> c(rows * 32);
  Dot<bf16>::run(in.a.data, in.lda, in.b.data, 32, rows, c.data(), 32, false);
}

void configures_only_when_rows_change() {
  const long start = config_loads();
  for (int rows : {32, 32, 32}) run_rows(rows);
  CHECK(config_loads() == start + 1);
  for (int rows : {7, 7, 32}) run_rows(rows);
  CHECK(config_loads() == start + 3);
  std::thread([] {
    run_rows(32);
    CHECK(config_loads() == 1, "a thread has tiles of its own");
    Dot<bf16>::release();
  }).join();
  Dot<bf16>::release();
  CHECK(!amx_emulated::state().configured);
  Dot<bf16>::release(); // harmless
  run_rows(32);
  CHECK(config_loads() == start + 4);
  Dot<bf16>::release();
}

// Products of 1 x 1 tiles of dwords that reveal the order of additions and the treatment of denormals.
float tile_product(float c, float a_even, float a_odd, float b_even, float b_odd) {
  amx_emulated::Config config = {};
  config.palette = 1;
  for (int t : {0, 1, 2}) {
    config.rows[t] = 1;
    config.column_bytes[t] = 4;
  }
  const bf16 a[2] = {to_bf16(a_even), to_bf16(a_odd)}, b[2] = {to_bf16(b_even), to_bf16(b_odd)};
  _tile_loadconfig(&config);
  _tile_loadd(0, &c, 4);
  _tile_loadd(1, a, 4);
  _tile_loadd(2, b, 4);
  _tile_dpbf16ps(0, 1, 2);
  _tile_stored(0, &c, 4);
  _tile_release();
  return c;
}

void emulation_adds_in_order() {
  CHECK(tile_product(100, 2, 3, 5, 7) == 131);
  // 1 + 2^-24 is a tie and rounds to 1, so adding the two halves in sequence would lose both.
  CHECK(tile_product(1, 0x1p-12f, 0x1p-12f, 0x1p-12f, 0x1p-12f) == 1 + 0x1p-23f);
  CHECK(tile_product(0, 0x1p-70f, 0, 0x1p-70f, 0) == 0);  // the product is denormal
  CHECK(tile_product(1e-40f, 0, 0, 0, 0) == 0);           // so is what is added to
  CHECK(tile_product(0, 0x1p-130f, 0, 0x1p100f, 0) == 0); // and the operand
  CHECK(std::isnan(tile_product(0, kNaN, 0, 1, 0)));
  CHECK(tile_product(0, kInfinity, 0, 1, 0) == kInfinity);
}

amx_emulated::Config config_of(int rows, int column_bytes) {
  amx_emulated::Config config = {};
  config.palette = 1;
  for (int t = 0; t < 8; ++t) {
    config.rows[t] = static_cast<uint8_t>(rows);
    config.column_bytes[t] = static_cast<uint16_t>(column_bytes);
  }
  return config;
}

// Each of these must abort.
void fault_unconfigured() { _tile_zero(0); }

void fault_released() {
  run_rows(3);
  Dot<bf16>::release();
  _tile_zero(0);
}

void fault_too_many_rows() {
  const auto config = config_of(17, 64);
  _tile_loadconfig(&config);
}

void fault_too_many_columns() {
  const auto config = config_of(16, 68);
  _tile_loadconfig(&config);
}

void fault_shapes_differ() {
  auto config = config_of(16, 64);
  config.rows[4] = 15;
  _tile_loadconfig(&config);
  _tile_dpbf16ps(0, 4, 6);
}

void fault_depths_differ() {
  auto config = config_of(16, 64);
  config.rows[6] = 8;
  _tile_loadconfig(&config);
  _tile_dpbf16ps(0, 4, 6);
}

void fault_same_tile_twice() {
  const auto config = config_of(16, 64);
  _tile_loadconfig(&config);
  _tile_dpbf16ps(0, 4, 4);
}

} // namespace

#endif
