// The interface between the kernels, compiled by nvcc once per element type (launch.cu), and the binding, compiled by
// the host compiler (module.cpp).  Functions enqueue work on a stream and never wait; they return an error
// text, empty on success.
#pragma once

#include <string>
#include <vector>

#include "launch_shape.h"

namespace trmfast {
namespace gpu {

// Device addresses, passed from Python.
using Address = uint64_t;

struct PackRequest {
  BlockShape block;
  std::vector<Address> weights; // f32, in the order of trmfast/spec.py
  Address packed;               // LayerLayout(block).elements()
  Address stream;
};

// See ForwardParams; `shape` belongs to the same block, batch and length.
struct ForwardRequest {
  LaunchShape shape;
  BlockShape block;
  int batch, length;
  int num_steps, num_runs;
  uint32_t unwritten;
  Address steps, sources, runs;
  std::vector<Address> weights, states_in, states_out;
  Address x, saved, cos, sin, exchange, arrivals, failed;
  uint64_t timeout_ns;
  Address stream;
};

// The code of one element type, for the current device.
struct Element {
  const char* name;
  std::string (*pack)(const PackRequest& request);
  std::string (*forward)(const ForwardRequest& request);
  // Blocks of an instance resident on one multiprocessor.
  std::string (*occupancy)(const InstanceSizes& sizes, int shared_bytes, int* blocks);
};

std::vector<InstanceSizes> instances();

} // namespace gpu
} // namespace trmfast
