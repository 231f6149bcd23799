// Speed of the matrix product micro-kernels as a share of the register peak of the same target in the same process.
//
//   g++ -std=c++17 -O3 FLAGS benchmarks/dot.cpp -o dot && ./dot [ROUNDS]
//     avx512_bf16   FLAGS = -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16
//     avx512        the same without -mavx512bf16;   avx2   -mavx2 -mfma -mf16c;   portable   none
//     (amx needs the process's permission for tile registers first, which csrc/cpu/isa.cpp asks for: -DASK_AMX isa.cpp)
//
// Each product is rows x depth times many panels of depth x 32: all row tiles for one panel, then the next panel, as a
// network's layer does it. Panels come from a set as large as a TRM's weights (they stay in L3) or small enough for L2.
// Data is random: constant operands would flatter it. The peak is measured before and after each round and the higher
// counts; printed is the median over the rounds of the share, and the quartiles. All times are processor time.
#include "../csrc/cpu/peak.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <random>
#include <type_traits>
#include <vector>

#ifdef ASK_AMX
#include "../csrc/cpu/isa.h"
#endif

using namespace trmfast;
using namespace trmfast::TRMFAST_NAMESPACE;

namespace {

template <class T> T* random_elements(long size, float scale) {
  static std::mt19937 generator(1);
  std::normal_distribution<float> normal(0, scale);
  T* data = static_cast<T*>(::operator new(size * sizeof(T), std::align_val_t(4096)));
  for (long i = 0; i < size; ++i) {
    if constexpr (std::is_same_v<T, float>)
      data[i] = normal(generator);
    else
      data[i] = to_bf16(normal(generator));
  }
  return data;
}

template <class T> void multiply(const T* a, const T* b, float* c, int rows, int depth, int panels, bool prefetch) {
  const long panel_size = 32L * depth;
  // As even as possible: no tile of a few rows at the end.
  const int tiles = (rows + Dot<T>::kRows - 1) / Dot<T>::kRows;
  for (int p = 0; p < panels; ++p) {
    const T* panel = b + p * panel_size;
    Prefetch next;
    if (prefetch && p + 1 < panels) next = {panel + panel_size, panel_size * static_cast<long>(sizeof(T))};
    for (int tile = 0; tile < tiles; ++tile) {
      const int first = rows * tile / tiles, last = rows * (tile + 1) / tiles;
      Dot<T>::run(a + static_cast<long>(first) * depth, depth, panel, depth, last - first, c + first * 32L, 32, false,
                  next);
    }
  }
  Dot<T>::release();
}

double quantile(std::vector<double> values, double q) {
  std::sort(values.begin(), values.end());
  return values[static_cast<size_t>(q * static_cast<double>(values.size() - 1) + 0.5)];
}

template <class T> void benchmark(const char* name, int rows, int depth, long weight_bytes, int rounds) {
  const int panels = static_cast<int>(weight_bytes / (32L * depth * static_cast<long>(sizeof(T))));
  T* a = random_elements<T>(static_cast<long>(rows) * depth, 1.0f);
  T* b = random_elements<T>(32L * depth * panels, 0.05f);
  float* c = random_elements<float>(rows * 32L, 1.0f);
  const double flops = 2.0 * rows * depth * 32 * panels;
  const int repeats = static_cast<int>(std::max(1.0, 1e9 / flops));
  std::vector<double> share[2], rate[2], peaks;
  double peak = peak_gflops<T>(0.005);
  for (int round = 0; round < rounds; ++round) {
    double measured[2];
    for (int prefetch = 0; prefetch < 2; ++prefetch) {
      const double start = thread_seconds();
      for (int i = 0; i < repeats; ++i) multiply(a, b, c, rows, depth, panels, prefetch == 1);
      measured[prefetch] = 1e-9 * flops * repeats / (thread_seconds() - start);
    }
    const double after = peak_gflops<T>(0.005);
    for (int prefetch = 0; prefetch < 2; ++prefetch) {
      rate[prefetch].push_back(measured[prefetch]);
      share[prefetch].push_back(100 * measured[prefetch] / std::max(peak, after));
    }
    peaks.push_back(std::max(peak, after));
    peak = after;
  }
  std::printf("%-5s rows %4d depth %5d panels %4d (%5.1f MB)  peak %6.1f GFLOP/s", name, rows, depth, panels,
              1e-6 * static_cast<double>(weight_bytes), quantile(peaks, 0.5));
  for (int prefetch = 0; prefetch < 2; ++prefetch) {
    std::printf("  %s %6.1f = %5.1f %% (%.1f-%.1f)", prefetch ? "with prefetch" : "without",
                quantile(rate[prefetch], 0.5), quantile(share[prefetch], 0.5), quantile(share[prefetch], 0.25),
                quantile(share[prefetch], 0.75));
  }
  std::printf("\n");
  std::fflush(stdout);
  ::operator delete(a, std::align_val_t(4096));
  ::operator delete(b, std::align_val_t(4096));
  ::operator delete(c, std::align_val_t(4096));
}

template <class T> void all(const char* name, int rounds) {
  const long element = sizeof(T);
  for (int rows : {97, 388}) {
    benchmark<T>(name, rows, 512, 6800000 * element, rounds);
    benchmark<T>(name, rows, 512, 150000 * element, rounds);
  }
  benchmark<T>(name, 97, 1536, 6800000 * element, rounds);
}

} // namespace

int main(int argc, char** argv) {
#ifdef ASK_AMX
  if (const char* reason = missing_reason("amx")) {
    std::fprintf(stderr, "%s\n", reason);
    return 1;
  }
#endif
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 15;
  all<bf16>("bf16", rounds);
  all<float>("f32", rounds);
}
