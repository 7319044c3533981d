// The kernels of mmi::WeightOnlyMatMul, and their launch on a stream.
#include <cuda_runtime_api.h>

#include "gemv.cuh"
#include "gemv_launch.h"
#include "gemv_plan.h"

MMI_GEMVS(MMI_GEMV_KERNEL)

namespace mmi {
namespace {

using GemvKernel = void (*)(GemvParameters);

#define MMI_CHOOSE_GEMV(NAME)                                              \
  switch (call.format) {                                                   \
    case WeightFormat::kInt8: return NAME##_int8;                          \
    case WeightFormat::kFp8: return NAME##_fp8;                            \
    default:                                                               \
      return call.block == 32   ? NAME##_int4_32                           \
             : call.block == 64 ? NAME##_int4_64                           \
                                : NAME##_int4_128;                         \
  }

GemvKernel kernel_of(const GemvCall& call) {
  if (call.type == DataType::kFloat16) {
    MMI_CHOOSE_GEMV(gemv_float16)
  }
  MMI_CHOOSE_GEMV(gemv_bfloat16)
}

}  // namespace

void preload_gemv() {
  cudaFuncAttributes attributes;
#define MMI_PRELOAD_GEMV(NAME, T, FORMAT) \
  cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(NAME));
  MMI_GEMVS(MMI_PRELOAD_GEMV)
  cudaGetLastError();  // clears the error: `launch_gemv` reports it where it matters
}

const char* launch_gemv(const GemvCall& call, CUstream_st* stream) {
  if (const char* reason = unsupported_reason(call)) return reason;
  GemvParameters parameters = gemv_parameters(call);
  const Grid grid = gemv_grid(call);
  void* arguments[] = {&parameters};
  const cudaError_t error =
      cudaLaunchKernel(reinterpret_cast<const void*>(kernel_of(call)), dim3(grid.x, grid.y, grid.z),
                       dim3(grid.threads), arguments, 0, stream);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace mmi
