// Small kernels in the primitives, which the tests run in the emulator and compile with nvcc. Tests plant bugs at
// marked places.
#pragma once

#include "primitives.cuh"

namespace trmfast {
namespace gpu {

enum class Bug {
  kNone,
  kMissingBarrier, // before the next tile overwrites the one being read
  kMissingWait,    // for cp.async
  kMissingCommit,
  kWaitForTooFew,     // one group fewer than is read
  kOutOfBounds,       // the last row of the output is one too far
  kOutOfBoundsShared, // the second buffer does not fit
  kMisaligned,        // rows of 39 elements for ldmatrix
  kWrongLaneMap,      // accumulator rows g and g + 8 swapped
  kWrongFragment,     // A's second and third registers swapped
};

// C [M, N] fp32 = A [M, K] B [K, N], row-major, M and N multiples of 64, K of kDepth. A block of four warps computes
// 64x64; each warp 32x32. Tiles [64, kDepth] of A and [kDepth, 64] of B come by cp.async in two buffers, rows padded by
// 16 bytes, so that the eight rows of an ldmatrix lie in different banks.
template <class Element, Bug kBug = Bug::kNone> struct Gemm {
  static constexpr int kTile = 64, kDepth = 32, kThreads = 128;
  static constexpr int kStrideA = kBug == Bug::kMisaligned ? kDepth + 7 : kDepth + 8, kStrideB = kTile + 8;
  static constexpr int kBuffer = kTile * (kDepth + 8) + kDepth * kStrideB; // elements
  static constexpr int kSharedBytes = (kBug == Bug::kOutOfBoundsShared ? 1 : 2) * kBuffer * 2;

  struct Params {
    GlobalPtr<const Element> a, b;
    GlobalPtr<float> c;
    int m, n, k;
  };

  static DEVICE void load_tiles(const Params& p, SharedPtr<Element> buffer, int row, int column, int depth) {
    UNROLL
    for (int i = thread_index(); i < kTile * kDepth / 8; i += kThreads) {
      const int y = i / (kDepth / 8), x = i % (kDepth / 8) * 8;
      cp_async_16(buffer + y * (kDepth + 8) + x, p.a + int64_t{row + y} * p.k + depth + x);
    }
    SharedPtr<Element> b = buffer + kTile * (kDepth + 8);
    UNROLL
    for (int i = thread_index(); i < kDepth * kTile / 8; i += kThreads) {
      const int y = i / (kTile / 8), x = i % (kTile / 8) * 8;
      cp_async_16(b + y * kStrideB + x, p.b + int64_t{depth + y} * p.n + column + x);
    }
    if constexpr (kBug != Bug::kMissingCommit) cp_async_commit();
  }

  static DEVICE void run(const Params& p) {
    const SharedPtr<Element> shared = shared_memory<Element>();
    const int tiles_n = p.n / kTile, row = block_index() / tiles_n * kTile, column = block_index() % tiles_n * kTile;
    const int lane = lane_index(), warp_row = warp_index() / 2 * 32, warp_column = warp_index() % 2 * 32;
    float acc[2][4][4] = {};
    load_tiles(p, shared, row, column, 0);
    const int steps = p.k / kDepth;
    NO_UNROLL
    for (int step = 0; step < steps; ++step) {
      const SharedPtr<Element> a = shared + step % 2 * kBuffer, b = a + kTile * (kDepth + 8);
      if (step + 1 < steps) load_tiles(p, shared + (step + 1) % 2 * kBuffer, row, column, (step + 1) * kDepth);
      if constexpr (kBug == Bug::kWaitForTooFew)
        cp_async_wait<1>();
      else if constexpr (kBug != Bug::kMissingWait) {
        if (step + 1 < steps)
          cp_async_wait<1>();
        else
          cp_async_wait<0>();
      }
      block_sync();
      UNROLL
      for (int k = 0; k < kDepth; k += 16) {
        uint32_t fa[2][4], fb[2][4]; // fb[j]: b0, b1 of two neighbouring n-tiles
        UNROLL
        for (int i = 0; i < 2; ++i)
          ldmatrix_x4(fa[i], a + (warp_row + 16 * i + lane % 16) * kStrideA + k + lane / 16 * 8);
        UNROLL
        for (int j = 0; j < 2; ++j)
          ldmatrix_x4_trans(fb[j], b + (k + lane % 16) * kStrideB + warp_column + 16 * j + lane / 16 * 8);
        UNROLL
        for (int i = 0; i < 2; ++i) {
          if constexpr (kBug == Bug::kWrongFragment) {
            const uint32_t second = fa[i][1];
            fa[i][1] = fa[i][2];
            fa[i][2] = second;
          }
          UNROLL
          for (int j = 0; j < 4; ++j)
            mma_m16n8k16<Element>(acc[i][j], fa[i], fb[j / 2][j % 2 * 2], fb[j / 2][j % 2 * 2 + 1]);
        }
      }
      if constexpr (kBug != Bug::kMissingBarrier) block_sync();
    }
    UNROLL
    for (int i = 0; i < 2; ++i) {
      UNROLL
      for (int j = 0; j < 4; ++j) {
        UNROLL
        for (int half = 0; half < 2; ++half) {
          int y = row + warp_row + 16 * i + 8 * (kBug == Bug::kWrongLaneMap ? 1 - half : half) + lane / 4;
          if (kBug == Bug::kOutOfBounds && y == p.m - 1) ++y;
          const int x = column + warp_column + 8 * j + lane % 4 * 2;
          store((p.c + int64_t{y} * p.n + x).template as<F32x2>(),
                F32x2{{acc[i][j][2 * half], acc[i][j][2 * half + 1]}});
        }
      }
    }
  }
};

// y = softmax(x) over rows of `columns` fp32, a row per warp. The row's exponentials pass through shared
// memory, in another order of lanes.
template <bool kSyncWarp = true, bool kDivergent = false> struct Softmax {
  struct Params {
    GlobalPtr<const float> x;
    GlobalPtr<float> y;
    int rows, columns;
  };

  static DEVICE void run(const Params& p) {
    constexpr float kLog2e = 1.4426950408889634f;
    const int row = block_index() * (thread_count() / kWarpSize) + warp_index(), lane = lane_index();
    if (row >= p.rows) return;
    const GlobalPtr<const float> x = p.x + int64_t{row} * p.columns;
    const SharedPtr<float> scratch = shared_memory<float>() + warp_index() * p.columns;
    float largest = -INFINITY, sum = 0;
    for (int i = lane; i < p.columns; i += kWarpSize) largest = fmaxf(largest, load_nc(x + i));
    if (!kDivergent || lane < 16) largest = warp_max(largest);
    for (int i = lane; i < p.columns; i += kWarpSize) {
      const float e = fast_exp2((load_nc(x + i) - largest) * kLog2e);
      store(scratch + i, e);
      sum += e;
    }
    sum = warp_sum(sum);
    if constexpr (kSyncWarp) sync_warp();
    for (int i = kWarpSize - 1 - lane; i < p.columns; i += kWarpSize)
      store(p.y + int64_t{row} * p.columns + i, load(scratch + i) * fast_rcp(sum));
  }
};

// Every block adds its index to the numbers of the block before it, `rounds` times: x [2][blocks][threads], the rounds
// alternate between the two. A barrier over the blocks separates the rounds.
template <bool kBarrier = true, bool kOneIsMissing = false> struct Ring {
  struct Params {
    GlobalPtr<uint32_t> x, counter, timed_out;
    int rounds;
    uint64_t timeout_ns;
  };

  static DEVICE void run(const Params& p) {
    const int blocks = block_count(), me = block_index(), before = (me + blocks - 1) % blocks;
    const int plane = blocks * thread_count();
    if (kOneIsMissing && me == 1) return;
    for (int round = 0; round < p.rounds; ++round) {
      const GlobalPtr<uint32_t> from = p.x + round % 2 * plane, to = p.x + (round + 1) % 2 * plane;
      const uint32_t old = load(from + before * thread_count() + thread_index());
      store(to + me * thread_count() + thread_index(), old + static_cast<uint32_t>(me));
      if constexpr (kBarrier) {
        const auto target = static_cast<uint32_t>(blocks * (round + 1));
        if (!group_barrier(p.counter, target, p.timeout_ns)) {
          if (thread_index() == 0) store_release(p.timed_out, 1u);
          return;
        }
      }
    }
  }
};

// The first warp loads tiles of 32 words into two slots, the second sums them: a full and an empty barrier per slot.
template <bool kWaitForEmpty = true> struct Pipeline {
  static constexpr int kThreads = 64, kSlots = 2;

  struct Params {
    GlobalPtr<const uint32_t> x;
    GlobalPtr<uint32_t> sum; // [32]
    int tiles;
  };

  static DEVICE void run(const Params& p) {
    const SharedPtr<uint32_t> slots = shared_memory<uint32_t>();
    const int lane = lane_index();
    const int full = 1, empty = 1 + kSlots;
    if (warp_index() == 0) {
      for (int i = 0; i < p.tiles; ++i) {
        const int slot = i % kSlots;
        if (kWaitForEmpty && i >= kSlots) named_barrier_sync(empty + slot, kThreads);
        store(slots + slot * 32 + lane, load_nc(p.x + i * 32 + lane));
        named_barrier_arrive(full + slot, kThreads);
      }
    } else {
      uint32_t sum = 0;
      for (int i = 0; i < p.tiles; ++i) {
        const int slot = i % kSlots;
        named_barrier_sync(full + slot, kThreads);
        sum += load(slots + slot * 32 + 31 - lane);
        if (kWaitForEmpty && i + kSlots < p.tiles) named_barrier_arrive(empty + slot, kThreads);
      }
      store(p.sum + lane, sum);
    }
  }
};

} // namespace gpu
} // namespace trmfast
