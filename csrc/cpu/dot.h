// Dot<T>: the matrix product micro-kernel of the target that this translation unit is compiled for.
//
//   struct Dot<T> {
//     kRows         most rows of one call (AMX 32, AVX-512 14, AVX2 6, portable 4)
//     kWholeRows    a call takes as long as for the next multiple of it (AMX 16, others 1)
//     kDepthStep    depth must be a multiple of it (AMX bf16 32, other bf16 2, float 1); pad a and b with zeros
//     run(a, lda, b, depth, rows, c, ldc, accumulate, next = {})
//                   c[r][0..31] (+)= sum_k a[r][k] * b[k][0..31] for r < rows, 1 <= rows <= kRows, accumulated in fp32
//                   over the whole depth. a: row-major, lda elements apart. b: one panel of 32 columns, 64-byte
//                   aligned, float [depth][32] or bf16 [depth/2][32][2]. c: fp32, row-major, ldc floats apart. Buffers
//                   must not overlap. With accumulate the product is added to c, summed from zero first but for AMX.
//                   next: Prefetch{from, bytes}, brought into L2 meanwhile, at most the size of the panel: the panel
//                   that comes next, whole or this call's share of it. Without it, panels that come from L3 cost a
//                   tenth. AMX: one more argument, meanwhile(step), is called at every step; see gemm_beside().
//     forget()      call when other code may have used the AMX tiles. Nothing elsewhere.
//     release()     call when this thread leaves the region that calls run: gives back the AMX tiles. Nothing
//     elsewhere.
//   };
#pragma once

#if defined(__AMX_BF16__) || defined(__AMXBF16__) || defined(TRMFAST_EMULATE_AMX)
#include "dot_amx.h"
#elif defined(__AVX512BF16__)
#include "dot_avx512_bf16.h"
#elif defined(__AVX512F__)
#include "dot_avx512.h"
#elif defined(__AVX2__)
#include "dot_avx2.h"
#else
#include "dot_portable.h"
#endif
