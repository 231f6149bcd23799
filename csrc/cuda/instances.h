// The instances of recursion_forward that are compiled: row tiles, stages, width tiles, token tiles, strip tiles
// (InstanceSizes in shape.h).  A device runs those that fit its shared memory: with 99 KB (sm_86, 89, 120) up to
// 32 rows of width 512, with 163 KB (sm_80) 64 rows and a short ring, with 227 KB (sm_90, 100) 64 rows and a long one.
#pragma once

#ifndef TRMFAST_INSTANCES
#define TRMFAST_INSTANCES(X)                                                                                           \
  X(1, 8, 4, 0, 0)                                                                                                     \
  X(4, 3, 4, 0, 0)                                                                                                     \
  X(1, 8, 8, 0, 0)                                                                                                     \
  X(2, 4, 8, 0, 0)                                                                                                     \
  X(4, 4, 8, 0, 0)                                                                                                     \
  X(4, 8, 8, 0, 0)                                                                                                     \
  X(1, 8, 4, 2, 4)                                                                                                     \
  X(4, 3, 4, 2, 4)                                                                                                     \
  X(2, 4, 8, 2, 4)                                                                                                     \
  X(4, 4, 8, 2, 4)                                                                                                     \
  X(4, 8, 8, 2, 4)                                                                                                     \
  X(2, 4, 8, 16, 1)                                                                                                    \
  X(4, 4, 8, 16, 2)
#endif
