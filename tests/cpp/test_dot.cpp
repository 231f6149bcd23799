// Tests of csrc/cpu/dot*.h, simd.h, bf16.h, peak.h and of the AMX emulation, for the target of the compile flags.
// One executable per target, one test per name given on the command line; tests/test_dot.py compiles and runs them.
#include <cmath>
#include <cstring>
#include <vector>

#include "../../csrc/cpu/isa.h"
#include "../../csrc/cpu/peak.h"
#include "amx_cases.h"
#include "check.h"
#include "numbers.h"
#include "simd_cases.h"

namespace {

template <class T> void check_product(int rows, int depth, int extra_lda, int extra_ldc, bool accumulate,
                                      bool prefetch) {
  const Operands<T> in(rows, depth, extra_lda);
  const long ldc = 32 + extra_ldc;
  Buffer<float> c((rows - 1) * ldc + 32);
  std::vector<float> before(c.size, kNaN);
  if (accumulate) {
    for (int r = 0; r < rows; ++r)
      for (int n = 0; n < 32; ++n) before[r * ldc + n] = c.data[r * ldc + n] = 10 * random_normal();
  }
  Prefetch next;
  if (prefetch) next = {in.b.data, 32L * depth * static_cast<long>(sizeof(T))};
  Dot<T>::run(in.a.data, in.lda, in.b.data, depth, rows, c.data, ldc, accumulate, next);

  for (int r = 0; r < rows; ++r) {
    for (int n = 0; n < 32; ++n) {
      double expected = accumulate ? before[r * ldc + n] : 0, magnitude = std::fabs(expected);
      for (int k = 0; k < depth; ++k) {
        const double product = static_cast<double>(to_float(in.a.data[r * in.lda + k])) *
                               static_cast<double>(to_float(in.b.data[panel_index<T>(k, n)]));
        expected += product;
        magnitude += std::fabs(product);
      }
      // The rounding errors of depth + 2 additions and, without fused multiply-adds, of a product, at their worst.
      const double bound = (depth + 3) * 0x1p-24 * magnitude;
      const double error = std::fabs(c.data[r * ldc + n] - expected);
      CHECK(error <= bound, "rows %d depth %d accumulate %d [%d][%d]: %g, off by %g, allowed %g", rows, depth,
            accumulate, r, n, static_cast<double>(c.data[r * ldc + n]), error, bound);
    }
    for (int n = 32; n < ldc && r + 1 < rows; ++n) {
      CHECK(bits_of(c.data[r * ldc + n]) == bits_of(kNaN), "rows %d: wrote between the rows of c", rows);
    }
  }
}

template <class T> void products() {
  constexpr int step = Dot<T>::kDepthStep;
  for (int rows = 1; rows <= Dot<T>::kRows; ++rows) {
    for (int steps : {1, 2, 3, 5, 11}) {
      for (bool accumulate : {false, true}) {
        check_product<T>(rows, steps * step, random_int(0, 40), random_int(0, 40), accumulate, random_int(0, 1));
      }
    }
  }
  for (int i = 0; i < 100; ++i) {
    check_product<T>(random_int(1, Dot<T>::kRows), random_int(1, 600 / step) * step, random_int(0, 3), random_int(0, 3),
                     random_int(0, 1), random_int(0, 1));
  }
  Dot<T>::release();
}

void product_float() { products<float>(); }
void product_bf16() { products<bf16>(); }

// A row's sums are bit-identical whatever rows are computed with it, and with or without prefetching: recomputed values
// must not depend on how rows are divided.
template <class T> void same_for_any_rows() {
  const int rows = Dot<T>::kRows, depth = 3 * 32;
  const Operands<T> in(rows, depth, 6);
  std::vector<float> together(rows * 32, kNaN), alone(rows * 32, kNaN);
  Dot<T>::run(in.a.data, in.lda, in.b.data, depth, rows, together.data(), 32, false, Prefetch{in.b.data, 64 * depth});
  for (int r = 0; r < rows; ++r) {
    Dot<T>::run(in.a.data + r * in.lda, in.lda, in.b.data, depth, 1, alone.data() + r * 32, 32, false);
  }
  Dot<T>::release();
  CHECK(std::memcmp(together.data(), alone.data(), together.size() * sizeof(float)) == 0);
}

void rows_are_independent() {
  same_for_any_rows<float>();
  same_for_any_rows<bf16>();
}

void peak_is_positive() {
  CHECK(peak_gflops<float>(0.001) > 0);
  CHECK(peak_gflops<bf16>(0.001) > 0);
}

const Test kTests[] = {
    {"product_float", product_float},
    {"product_bf16", product_bf16},
    {"rows_are_independent", rows_are_independent},
    {"bf16_rounding", bf16_rounding},
    {"exp_accuracy", exp_accuracy},
    {"exp2_accuracy", exp2_accuracy},
    {"sigmoid_and_silu_accuracy", sigmoid_and_silu_accuracy},
    {"rsqrt_accuracy", rsqrt_accuracy},
    {"partial_loads_and_stores", partial_loads_and_stores},
    {"lanes_and_comparisons", lanes_and_comparisons},
    {"peak_is_positive", peak_is_positive},
#ifdef TRMFAST_EMULATE_AMX
    {"configures_only_when_rows_change", configures_only_when_rows_change},
    {"emulation_adds_in_order", emulation_adds_in_order},
    {"fault_unconfigured", fault_unconfigured},
    {"fault_released", fault_released},
    {"fault_too_many_rows", fault_too_many_rows},
    {"fault_too_many_columns", fault_too_many_columns},
    {"fault_shapes_differ", fault_shapes_differ},
    {"fault_depths_differ", fault_depths_differ},
    {"fault_same_tile_twice", fault_same_tile_twice},
#endif
};

} // namespace

int main(int argc, char** argv) {
#ifdef __AMX_TILE__
  // Asks the kernel for the tile registers of this process.
  if (const char* reason = trmfast::missing_reason("amx")) {
    std::puts(reason);
    return 1;
  }
#endif
  return run_test(argc, argv, kTests);
}
