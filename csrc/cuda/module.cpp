// trmfast._cuda: the Python binding of the CUDA engine.  Tensors arrive as device addresses and sizes, so no torch
// header is needed and one binary serves every torch.  Nothing here waits for the device.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cuda_runtime_api.h>
#include <stdexcept>
#include <tuple>

#include "instances.h"
#include "launch.h"

namespace py = pybind11;

namespace trmfast {
namespace gpu {

extern const Element element_bf16, element_fp16;

std::vector<InstanceSizes> instances() {
  return {
#define SIZES(...) InstanceSizes{__VA_ARGS__},
      TRMFAST_INSTANCES(SIZES)
#undef SIZES
  };
}

namespace {

const Element& find_element(const std::string& name) {
  for (const Element* element : {&element_bf16, &element_fp16})
    if (name == element->name) return *element;
  throw std::invalid_argument("element: got " + name + ", accepted are bf16 and fp16");
}

void check(const std::string& error) {
  if (!error.empty()) throw std::runtime_error("trmfast CUDA: " + error);
}

void check(cudaError_t error, const char* doing) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  check(std::string(doing) + ": " + cudaGetErrorString(error));
}

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), "device attributes");
  return value;
}

// The shape and the program of a launch, as lists of words.
struct Prepared {
  BlockShape block;
  LaunchShape shape;
  int batch, length;
  Schedule schedule;
};

// A one-line reason, or what to launch.
py::object prepare(const BlockShape& block, const std::vector<int>& layers, int num_states,
                   const std::vector<std::tuple<int, std::vector<int>, bool, int, bool>>& program, int batch,
                   int length, const Device& device) {
  if (num_states > kMostStates || static_cast<int>(layers.size()) > kMostNets)
    return py::str("it takes up to " + number(kMostStates) + " states and " + number(kMostNets) + " networks");
  LaunchShape shape{};
  const std::string reason = choose_launch(instances(), block, batch, length, device, &shape);
  if (!reason.empty()) return py::str(reason);
  std::vector<Update> updates;
  for (const auto& [dst, sources, inject_x, net, grad] : program)
    updates.push_back({dst, net, sources, inject_x, grad});
  const LayerLayout layout(block);
  return py::cast(Prepared{block, shape, batch, length,
                           Schedule(shape.sizes, layout, shape.group_blocks, num_states, updates, layers)});
}

} // namespace
} // namespace gpu
} // namespace trmfast

PYBIND11_MODULE(_cuda, m) {
  using namespace trmfast::gpu;
  m.doc() = "The CUDA engine of trmfast.  Private: use trmfast.recursion.";
  m.attr("architectures") = TRMFAST_ARCHITECTURES;
  m.attr("arrival_stride") = kArrivalStride;

  // Local to the module: a process may load the engine twice, as tests/standin does.
  py::class_<BlockShape>(m, "BlockShape", py::module_local())
      .def(py::init([](int width, int inner, bool attention, int heads, int kv_heads, int head_dim, bool causal,
                       int seq_len, int seq_inner, int conv_taps, float eps) {
             return BlockShape{width,  inner,   attention, heads,     kv_heads, head_dim,
                               causal, seq_len, seq_inner, conv_taps, eps};
           }),
           py::kw_only(), py::arg("width"), py::arg("inner"), py::arg("attention"), py::arg("heads"),
           py::arg("kv_heads"), py::arg("head_dim"), py::arg("causal"), py::arg("seq_len"), py::arg("seq_inner"),
           py::arg("conv_taps"), py::arg("eps"))
      .def_property_readonly("packed_elements", [](const BlockShape& block) { return LayerLayout(block).elements(); });

  py::class_<Device>(m, "Device", py::module_local())
      .def(py::init([](int shared_bytes, int multiprocessors, int stream_rows, int cache_blocks) {
             return Device{shared_bytes, multiprocessors, stream_rows, cache_blocks};
           }),
           py::kw_only(), py::arg("shared_bytes"), py::arg("multiprocessors"), py::arg("stream_rows"),
           py::arg("cache_blocks"));
  m.def(
      "limits",
      [](int index) {
        return std::make_tuple(attribute(cudaDevAttrComputeCapabilityMajor, index),
                               attribute(cudaDevAttrComputeCapabilityMinor, index),
                               attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index),
                               attribute(cudaDevAttrMultiProcessorCount, index));
      },
      py::arg("index"));
  m.def("missing_driver", []() -> py::object {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error == cudaSuccess) return py::none();
    cudaGetLastError();
    return py::str(cudaGetErrorString(error));
  });

  py::class_<Prepared>(m, "Prepared", py::module_local())
      .def_property_readonly("steps", [](const Prepared& p) { return p.schedule.steps; })
      .def_property_readonly("sources", [](const Prepared& p) { return p.schedule.sources; })
      .def_property_readonly("runs", [](const Prepared& p) { return p.schedule.runs; })
      .def_property_readonly("groups", [](const Prepared& p) { return p.shape.groups; })
      .def_property_readonly("group_blocks", [](const Prepared& p) { return p.shape.group_blocks; })
      .def_property_readonly("shared_bytes", [](const Prepared& p) { return p.shape.shared_bytes; })
      .def_property_readonly("rows", [](const Prepared& p) { return 16 * p.shape.sizes.row_tiles; })
      .def_property_readonly("channels", [](const Prepared& p) { return 16 * p.shape.sizes.strip_tiles; })
      .def_property_readonly("packed", [](const Prepared& p) { return LayerLayout(p.block).elements(); })
      .def_property_readonly("token_packed", [](const Prepared& p) { return LayerLayout(p.block).token_elements(); })
      .def_property_readonly("head_width", [](const Prepared& p) { return LayerLayout(p.block).head_width; })
      .def_property_readonly("exchange_elements",
                             [](const Prepared& p) { return p.shape.groups * p.shape.exchange_elements; })
      .def("resident_blocks", [](const Prepared& p, const std::string& element) {
        int blocks = 0;
        check(find_element(element).occupancy(p.shape.sizes, p.shape.shared_bytes, &blocks));
        return blocks;
      });
  m.def("prepare", &prepare, py::arg("block"), py::arg("layers"), py::arg("num_states"), py::arg("program"),
        py::arg("batch"), py::arg("length"), py::arg("device"));

  m.def("pack", [](const std::string& element, const BlockShape& block, const std::vector<Address>& weights,
                   Address packed, Address stream) {
    if (weights.size() != 4) throw std::invalid_argument("weights: got " + number(weights.size()) + ", accepted are 4");
    check(find_element(element).pack({block, weights, packed, stream}));
  });
  m.def(
      "forward",
      [](const std::string& element, const Prepared& p, Address steps, Address sources, Address runs,
         const std::vector<Address>& weights, const std::vector<Address>& states_in,
         const std::vector<Address>& states_out, Address x, Address saved, Address cos, Address sin, Address exchange,
         Address arrivals, Address failed, uint64_t timeout_ns, Address stream) {
        check(find_element(element).forward({p.shape,
                                             p.block,
                                             p.batch,
                                             p.length,
                                             static_cast<int>(p.schedule.steps.size() / 4),
                                             static_cast<int>(p.schedule.runs.size() / 4),
                                             p.schedule.unwritten,
                                             steps,
                                             sources,
                                             runs,
                                             weights,
                                             states_in,
                                             states_out,
                                             x,
                                             saved,
                                             cos,
                                             sin,
                                             exchange,
                                             arrivals,
                                             failed,
                                             timeout_ns,
                                             stream}));
      },
      py::kw_only(), py::arg("element"), py::arg("prepared"), py::arg("steps"), py::arg("sources"), py::arg("runs"),
      py::arg("weights"), py::arg("states_in"), py::arg("states_out"), py::arg("x"), py::arg("saved"), py::arg("cos"),
      py::arg("sin"), py::arg("exchange"), py::arg("arrivals"), py::arg("failed"), py::arg("timeout_ns"),
      py::arg("stream"));
}
