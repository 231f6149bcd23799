// The examples as device code, to see how nvcc compiles the primitives.
#include "examples.cuh"

using namespace trmfast::gpu;

__global__ void __launch_bounds__(128) gemm_bf16(const __grid_constant__ Gemm<bf16>::Params p) { Gemm<bf16>::run(p); }
__global__ void __launch_bounds__(128) gemm_fp16(const __grid_constant__ Gemm<fp16>::Params p) { Gemm<fp16>::run(p); }
__global__ void __launch_bounds__(128) softmax(const __grid_constant__ Softmax<>::Params p) { Softmax<>::run(p); }
__global__ void __launch_bounds__(128) ring(const __grid_constant__ Ring<>::Params p) { Ring<>::run(p); }
__global__ void __launch_bounds__(64) pipeline(const __grid_constant__ Pipeline<>::Params p) { Pipeline<>::run(p); }
