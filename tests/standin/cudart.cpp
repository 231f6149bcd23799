// A CUDA runtime without a driver: what csrc/cuda calls of it, for a device that Python describes.  A launch is checked
// as the runtime would check it, and handed to Python (tests/standin/driver.py) with the bytes of its parameters.
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <vector>

namespace {

constexpr size_t kSharedByDefault = 48 << 10; // more has to be asked for

// Mirrored in tests/standin/driver.py.
struct Launch {
  const char* kernel;
  uint32_t grid, threads, cooperative;
  uint64_t shared_bytes, stream;
  const void* params; // of the one parameter
};

struct Device {
  int32_t (*launch)(const Launch*) = nullptr; // 0, or an error for the caller
  int32_t major = 8, minor = 0, shared_bytes = 163 << 10, multiprocessors = 8, resident = 1;
};

struct Kernel {
  std::string name;
  size_t shared_bytes = kSharedByDefault;
};

struct Pushed {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};

Device device;
cudaError_t last = cudaSuccess;
std::vector<Pushed> pushed;
std::string failing; // the next call of this function fails

std::vector<std::string>& modules() {
  static std::vector<std::string> found;
  return found;
}

std::map<const void*, Kernel>& kernels() {
  static std::map<const void*, Kernel> found;
  return found;
}

cudaError_t done(cudaError_t error) {
  if (error != cudaSuccess) last = error;
  return error;
}

bool fails(const char* function) {
  if (failing != function) return false;
  failing.clear();
  return true;
}

// PTX in a fat binary that nvcc did not compress: a header, then entries with headers of their own.
std::string ptx_of(const void* wrapper) {
  const char* fat;
  std::memcpy(&fat, static_cast<const char*>(wrapper) + 8, sizeof fat);
  uint16_t header;
  uint64_t bytes;
  std::memcpy(&header, fat + 6, sizeof header);
  std::memcpy(&bytes, fat + 8, sizeof bytes);
  for (const char *entry = fat + header, *end = entry + bytes; entry < end;) {
    uint16_t kind;
    uint32_t entry_header;
    uint64_t size;
    std::memcpy(&kind, entry, sizeof kind);
    std::memcpy(&entry_header, entry + 4, sizeof entry_header);
    std::memcpy(&size, entry + 8, sizeof size);
    if (kind == 1) return std::string(entry + entry_header, strnlen(entry + entry_header, size));
    entry += entry_header + size;
  }
  return "";
}

cudaError_t launch(const void* function, dim3 grid, dim3 block, void** args, size_t shared, cudaStream_t stream,
                   bool cooperative) {
  if (fails("launch")) return done(cudaErrorLaunchOutOfResources);
  const auto found = kernels().find(function);
  if (found == kernels().end()) return done(cudaErrorInvalidDeviceFunction);
  if (grid.x == 0 || grid.y != 1 || grid.z != 1 || block.x == 0 || block.x > 1024)
    return done(cudaErrorInvalidConfiguration);
  if (shared > found->second.shared_bytes) return done(cudaErrorInvalidValue);
  if (cooperative && grid.x > static_cast<uint32_t>(device.resident * device.multiprocessors))
    return done(cudaErrorCooperativeLaunchTooLarge);
  const Launch request{found->second.name.c_str(),         grid.x, block.x, cooperative, shared,
                       reinterpret_cast<uint64_t>(stream), args[0]};
  return done(static_cast<cudaError_t>(device.launch(&request)));
}

} // namespace

extern "C" {

// ---- for Python

void standin_set_device(const Device* asked) { device = *asked; }
void standin_fail_next(const char* function) { failing = function; }
int standin_last_error() { return last; }
int standin_modules() { return static_cast<int>(modules().size()); }
const char* standin_ptx(int index) { return modules()[static_cast<size_t>(index)].c_str(); }

// ---- what the compiler's code calls

void** __cudaRegisterFatBinary(void* wrapper) {
  modules().push_back(ptx_of(wrapper));
  return reinterpret_cast<void**>(wrapper);
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  kernels()[function] = {name};
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, CUstream_st* stream) {
  pushed.push_back({grid, block, shared, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  const Pushed top = pushed.back();
  pushed.pop_back();
  *grid = top.grid;
  *block = top.block;
  *shared = top.shared;
  *static_cast<cudaStream_t*>(stream) = top.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** args, size_t shared,
                               cudaStream_t stream) {
  return launch(kernel, grid, block, args, shared, stream, false);
}

// ---- the runtime

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** args, size_t shared,
                             cudaStream_t stream) {
  return launch(function, grid, block, args, shared, stream, false);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** args) {
  bool cooperative = false;
  for (unsigned i = 0; i < config->numAttrs; ++i)
    cooperative |= config->attrs[i].id == cudaLaunchAttributeCooperative && config->attrs[i].val.cooperative != 0;
  return launch(function, config->gridDim, config->blockDim, args, config->dynamicSmemBytes, config->stream,
                cooperative);
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute name, int value) {
  if (fails("cudaFuncSetAttribute")) return done(cudaErrorInvalidValue);
  const auto found = kernels().find(function);
  if (found == kernels().end()) return done(cudaErrorInvalidDeviceFunction);
  if (name != cudaFuncAttributeMaxDynamicSharedMemorySize || value > device.shared_bytes)
    return done(cudaErrorInvalidValue);
  found->second.shared_bytes = static_cast<size_t>(value);
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* function, int,
                                                                   size_t shared, unsigned) {
  if (fails("occupancy")) return done(cudaErrorUnknown);
  const auto found = kernels().find(function);
  if (found == kernels().end()) return done(cudaErrorInvalidDeviceFunction);
  *blocks = shared > found->second.shared_bytes ? 0 : device.resident;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int) {
  if (fails("cudaDeviceGetAttribute")) return done(cudaErrorInvalidDevice);
  switch (name) {
  case cudaDevAttrComputeCapabilityMajor:
    *value = device.major;
    return cudaSuccess;
  case cudaDevAttrComputeCapabilityMinor:
    *value = device.minor;
    return cudaSuccess;
  case cudaDevAttrMaxSharedMemoryPerBlockOptin:
    *value = device.shared_bytes;
    return cudaSuccess;
  case cudaDevAttrMultiProcessorCount:
    *value = device.multiprocessors;
    return cudaSuccess;
  default:
    return done(cudaErrorInvalidValue);
  }
}
cudaError_t cudaGetDeviceCount(int* count) {
  if (fails("cudaGetDeviceCount")) return done(cudaErrorInsufficientDriver);
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() {
  const cudaError_t found = last;
  last = cudaSuccess;
  return found;
}
const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
  case cudaErrorInvalidValue:
    return "invalid argument";
  case cudaErrorInvalidConfiguration:
    return "invalid configuration argument";
  case cudaErrorInvalidDeviceFunction:
    return "invalid device function";
  case cudaErrorInvalidDevice:
    return "invalid device ordinal";
  case cudaErrorInsufficientDriver:
    return "CUDA driver version is insufficient for CUDA runtime version";
  case cudaErrorLaunchOutOfResources:
    return "too many resources requested for launch";
  case cudaErrorCooperativeLaunchTooLarge:
    return "too many blocks in cooperative launch";
  default:
    return "unknown error";
  }
}
}
