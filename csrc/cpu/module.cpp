// trmfast._cpu: the Python binding of the engine.  Tensors arrive as addresses of contiguous memory and sizes, so no
// torch header is needed and one binary serves every torch.  The GIL is released while the engine runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <optional>
#include <tuple>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__APPLE__)
#include <pthread.h>
#endif

#include "dispatch.h"
#include "fingerprint.h"
#include "isa.h"
#include "monitor.h"
#include "thread_pool.h"

namespace py = pybind11;

namespace trmfast {
namespace {

using Address = uintptr_t;

template <class T> std::vector<T*> pointers(const std::vector<Address>& addresses) {
  std::vector<T*> result;
  for (const Address address : addresses) result.push_back(reinterpret_cast<T*>(address));
  return result;
}

// A program in the engine's form.
struct OwnedProgram {
  std::vector<Update> updates;
  std::vector<int> sources;
  int num_states;

  // updates: (dst, sources, inject_x, net, grad)
  OwnedProgram(int num_states, const std::vector<std::tuple<int, std::vector<int>, bool, int, bool>>& list)
      : num_states(num_states) {
    if (num_states > kMostStates)
      throw std::invalid_argument("num_states: got " + std::to_string(num_states) + ", accepted are up to " +
                                  std::to_string(kMostStates));
    for (const auto& [dst, from, inject_x, net, grad] : list) {
      updates.push_back({dst, static_cast<int>(sources.size()), static_cast<int>(from.size()), inject_x, net, grad});
      sources.insert(sources.end(), from.begin(), from.end());
    }
  }
  Program view() const { return {updates.data(), static_cast<int>(updates.size()), sources.data(), num_states}; }
};

// Shared by forward and backward; owns the arrays that Job points to.
struct OwnedJob {
  std::vector<NetShape> shapes;
  std::vector<PackedNet> packed;
  Job job;

  OwnedJob(const OwnedProgram& program, const std::vector<const PackedWeights*>& nets, std::tuple<int, int, int> shape,
           Address cos, Address sin, Address segments, int threads, Monitor* monitor) {
    for (const PackedWeights* net : nets) {
      shapes.push_back(net->net);
      packed.push_back(net->view());
    }
    job = {std::get<0>(shape),
           std::get<1>(shape),
           std::get<2>(shape),
           program.view(),
           shapes.data(),
           packed.data(),
           static_cast<int>(nets.size()),
           reinterpret_cast<const float*>(cos),
           reinterpret_cast<const float*>(sin),
           threads,
           nullptr,
           monitor,
           reinterpret_cast<const int32_t*>(segments)};
  }
};

// Python runs signal handlers only on this thread.
bool on_main_thread() {
#if defined(__linux__)
  return getpid() == static_cast<pid_t>(syscall(SYS_gettid));
#elif defined(__APPLE__)
  return pthread_main_np() != 0;
#else
  return false;
#endif
}

// What runs in Python during a job: signal handlers, such as Ctrl-C's, whose exception stops the job; and `phases`,
// unless it is None, called with the name of every phase and finally with None.
class PythonMonitor {
public:
  explicit PythonMonitor(const py::object& phases)
      : phases_(phases), monitor(&handle_signals, phases.is_none() ? nullptr : &tell_phase, this) {}

  void rethrow() const {
    if (error_) throw py::error_already_set(*error_);
  }

private:
  static bool handle_signals(void* context) {
    auto& self = *static_cast<PythonMonitor*>(context);
    if (!self.error_ && on_main_thread()) {
      const py::gil_scoped_acquire acquired;
      if (PyErr_CheckSignals() != 0) self.error_.emplace();
    }
    return self.error_.has_value();
  }
  static void tell_phase(void* context, const char* name) {
    auto& self = *static_cast<PythonMonitor*>(context);
    const py::gil_scoped_acquire acquired;
    try {
      self.phases_(name ? py::object(py::str(name)) : py::object(py::none()));
    } catch (const py::error_already_set& error) {
      if (!self.error_) self.error_.emplace(error);
    }
  }

  const py::object& phases_;
  std::optional<py::error_already_set> error_;

public:
  Monitor monitor;
};

// Address and pairs of the kept activations, and of the kept outputs.
using KeptArguments = std::tuple<Address, int, Address, int>;

Kept kept_of(const KeptArguments& kept) {
  const auto& [activations, pairs, outputs, output_pairs] = kept;
  return {reinterpret_cast<void*>(activations), pairs, reinterpret_cast<void*>(outputs), output_pairs};
}

void forward(const OwnedProgram& program, const std::vector<const PackedWeights*>& nets,
             std::tuple<int, int, int> shape, const std::vector<Address>& states_in,
             const std::vector<Address>& states_out, Address x, Address saved, const KeptArguments& kept, Address cos,
             Address sin, int threads, const py::object& phases, Address segments) {
  PythonMonitor python(phases);
  const OwnedJob owned(program, nets, shape, cos, sin, segments, threads, &python.monitor);
  const auto in = pointers<const void>(states_in);
  const auto out = pointers<void>(states_out);
  run(nets[0]->engine, ForwardJob{owned.job, in.data(), out.data(), reinterpret_cast<const void*>(x),
                                  reinterpret_cast<void*>(saved), kept_of(kept)});
  python.rethrow();
}

// The size of the activations of one update of one sequence that forward keeps, and of the outputs of its blocks alone;
// those of several take at most as many times as much.  layers: those of each net, whether it has a final norm, and its
// injection.
std::pair<size_t, size_t> pair_bytes(const std::string& target, const std::string& element, const BlockShape& block,
                                     const std::vector<std::tuple<int, bool, int>>& layers, int length) {
  std::vector<NetShape> nets;
  for (const auto& [count, final_norm, injection] : layers)
    nets.push_back({block, count, final_norm, static_cast<Injection>(injection)});
  Job job = {};
  job.length = length;
  job.nets = nets.data();
  job.num_nets = static_cast<int>(nets.size());
  const Engine& engine = find_engine(target, element);
  return {engine.kept_bytes(job, 1), engine.output_bytes(job, 1)};
}

void backward(const OwnedProgram& program, const std::vector<const PackedWeights*>& nets,
              std::tuple<int, int, int> shape, const std::vector<Address>& grad_states_out, Address saved,
              const KeptArguments& kept, const std::vector<Address>& grad_states, Address grad_x,
              const std::vector<Address>& grad_weights, Address cos, Address sin, int threads, size_t store_bytes,
              const std::vector<Address>& weights_f32, const py::object& phases, Address segments, Address x) {
  PythonMonitor python(phases);
  const OwnedJob owned(program, nets, shape, cos, sin, segments, threads, &python.monitor);
  const auto from = pointers<const void>(grad_states_out);
  const auto states = pointers<float>(grad_states);
  const auto weights = pointers<float>(grad_weights);
  const auto read = pointers<const float>(weights_f32);
  run(nets[0]->engine, BackwardJob{owned.job, from.data(), reinterpret_cast<const void*>(saved), kept_of(kept),
                                   states.data(), reinterpret_cast<float*>(grad_x), weights.data(), store_bytes,
                                   read.data(), reinterpret_cast<const void*>(x)});
  python.rethrow();
}

// One int8 product of a target, on a workspace of garbage: see Int8Product.
void int8_product(const std::string& target, Address x, Address weights, std::tuple<int, int, int> sizes, bool left,
                  const std::vector<Address>& outputs) {
  const Engine& engine = find_engine(target, "i8");
  const auto [rows, columns, depth] = sizes;
  Int8Product product{reinterpret_cast<const void*>(x),
                      reinterpret_cast<const float*>(weights),
                      rows,
                      columns,
                      depth,
                      left,
                      reinterpret_cast<int8_t*>(outputs.at(0)),
                      reinterpret_cast<float*>(outputs.at(1)),
                      reinterpret_cast<int8_t*>(outputs.at(2)),
                      reinterpret_cast<float*>(outputs.at(3)),
                      reinterpret_cast<int32_t*>(outputs.at(4)),
                      reinterpret_cast<float*>(outputs.at(5)),
                      nullptr};
  const Workspace workspace(engine.int8_product_bytes(product));
  product.workspace = workspace.get();
  std::memset(workspace.get(), 0xff, engine.int8_product_bytes(product));
  engine.int8_product(product);
}

} // namespace
} // namespace trmfast

PYBIND11_MODULE(_cpu, m) {
  using namespace trmfast;
  using Released = py::call_guard<py::gil_scoped_release>;
  m.doc() = "The CPU engine of trmfast.  Private: use trmfast.recursion.";

  py::class_<BlockShape>(m, "BlockShape")
      .def(py::init([](int width, int inner, bool attention, int heads, int kv_heads, int head_dim, bool causal,
                       int seq_len, int seq_inner, int conv_taps, float eps, bool input_norm, bool branch_norm,
                       bool sum_norm, bool norm_weight, bool interleaved, bool qk_norm, bool qk_norm_weight,
                       bool qk_bias, int gate, int window, bool decay, int activation) {
             return BlockShape{width,
                               inner,
                               attention,
                               heads,
                               kv_heads,
                               head_dim,
                               causal,
                               seq_len,
                               seq_inner,
                               conv_taps,
                               eps,
                               input_norm,
                               branch_norm,
                               sum_norm,
                               norm_weight,
                               interleaved,
                               qk_norm,
                               qk_norm_weight,
                               qk_bias,
                               static_cast<OutputGate>(gate),
                               window,
                               decay,
                               static_cast<Activation>(activation)};
           }),
           py::kw_only(), py::arg("width"), py::arg("inner"), py::arg("attention"), py::arg("heads"),
           py::arg("kv_heads"), py::arg("head_dim"), py::arg("causal"), py::arg("seq_len"), py::arg("seq_inner"),
           py::arg("conv_taps"), py::arg("eps"), py::arg("input_norm") = false, py::arg("branch_norm") = false,
           py::arg("sum_norm") = true, py::arg("norm_weight") = false, py::arg("interleaved") = false,
           py::arg("qk_norm") = false, py::arg("qk_norm_weight") = false, py::arg("qk_bias") = false,
           py::arg("gate") = 0, py::arg("window") = 0, py::arg("decay") = false, py::arg("activation") = 0);

  py::class_<OwnedProgram>(m, "Program")
      .def(py::init<int, const std::vector<std::tuple<int, std::vector<int>, bool, int, bool>>&>(),
           py::arg("num_states"), py::arg("updates"));

  py::class_<PackedWeights>(m, "PackedWeights")
      .def(
          py::init([](const std::string& target, const std::string& element, const BlockShape& block, int layers,
                      const std::vector<Address>& weights, bool backward, int threads, bool final_norm, int injection) {
            const Engine& engine = find_engine(target, element);
            const py::gil_scoped_release released; // not Released(): it would cover pybind11's registration too
            const NetShape net{block, layers, final_norm, static_cast<Injection>(injection)};
            return std::make_unique<PackedWeights>(engine, net, pointers<const float>(weights), backward, threads);
          }),
          py::arg("target"), py::arg("element"), py::arg("block"), py::arg("layers"), py::arg("weights"),
          py::arg("backward"), py::arg("threads"), py::arg("final_norm") = false, py::arg("injection") = 0)
      .def_property_readonly("bytes", &PackedWeights::bytes);

  // What forward keeps for backward: a byte buffer, so that a tensor made by torch.frombuffer keeps it alive.
  py::class_<PooledMemory>(m, "KeptActivations", py::buffer_protocol())
      .def(py::init([](size_t bytes) {
             const py::gil_scoped_release released;
             return std::make_unique<PooledMemory>(kept_activations_pool(), bytes);
           }),
           py::arg("bytes"))
      .def_buffer([](PooledMemory& kept) {
        return py::buffer_info(static_cast<uint8_t*>(kept.get()), static_cast<py::ssize_t>(kept.bytes()));
      });

  m.def("compiled_pairs", [] {
    std::vector<std::pair<std::string, std::string>> pairs;
    for (const Pair& pair : compiled_pairs()) pairs.emplace_back(pair.target, pair.element);
    return pairs;
  });
  m.def("missing_reason", [](const std::string& target) -> py::object {
    const char* reason = missing_reason(target);
    return reason ? py::object(py::str(reason)) : py::object(py::none());
  });
  m.def("release_memory", &release_memory);
  m.def(
      "use_openmp",
      [](Address parallel, Address num_threads, Address thread_num) {
        use_openmp({reinterpret_cast<decltype(OpenMp::parallel)>(parallel),
                    reinterpret_cast<decltype(OpenMp::num_threads)>(num_threads),
                    reinterpret_cast<decltype(OpenMp::thread_num)>(thread_num)});
      },
      py::arg("parallel"), py::arg("num_threads"), py::arg("thread_num"));
  m.def("uses_openmp", &uses_openmp);
  m.def("int8_product", &int8_product, py::arg("target"), py::arg("x"), py::arg("weights"), py::arg("sizes"),
        py::arg("left"), py::arg("outputs"), Released());
  m.def("pair_bytes", &pair_bytes, py::arg("target"), py::arg("element"), py::arg("block"), py::arg("layers"),
        py::arg("length"), Released());
  m.def("forward", &forward, py::arg("program"), py::arg("nets"), py::arg("shape"), py::arg("states_in"),
        py::arg("states_out"), py::arg("x"), py::arg("saved"), py::arg("kept"), py::arg("cos"), py::arg("sin"),
        py::arg("threads"), py::arg("phases") = py::none(), py::arg("segments") = 0, Released());
  m.def("backward", &backward, py::arg("program"), py::arg("nets"), py::arg("shape"), py::arg("grad_states_out"),
        py::arg("saved"), py::arg("kept"), py::arg("grad_states"), py::arg("grad_x"), py::arg("grad_weights"),
        py::arg("cos"), py::arg("sin"), py::arg("threads"), py::arg("store_bytes"), py::arg("weights"),
        py::arg("phases") = py::none(), py::arg("segments") = 0, py::arg("x") = 0, Released());
  m.def(
      "fingerprint",
      [](const std::vector<Address>& arrays, const std::vector<int64_t>& sizes, int threads) {
        return fingerprint(pointers<const char>(arrays), sizes, threads);
      },
      Released());
  m.def(
      "peak_gflops",
      [](const std::string& target, const std::string& element, int threads, double seconds) {
        return measure_peak(find_engine(target, element), threads, seconds);
      },
      py::arg("target"), py::arg("element"), py::arg("threads"), py::arg("seconds") = 0.2, Released());
}
