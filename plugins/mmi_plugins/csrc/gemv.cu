// The kernels of mmi::WeightOnlyMatMul, and their launch on a stream.
#include <cuda_runtime_api.h>

#include "gemv_rows.cuh"
#include "gemv_launch.h"
#include "gemv_plan.h"

MMI_GEMVS(MMI_GEMV_KERNEL)
MMI_GEMVS(MMI_GEMV_ROWS_KERNEL)

namespace mmi {
namespace {

using GemvKernel = void (*)(GemvParameters);

#define MMI_CHOOSE_GEMV(NAME, SUFFIX)                                      \
  switch (call.format) {                                                   \
    case WeightFormat::kInt8: return NAME##_int8##SUFFIX;                  \
    case WeightFormat::kFp8: return NAME##_fp8##SUFFIX;                    \
    default:                                                               \
      return call.block == 32   ? NAME##_int4_32##SUFFIX                   \
             : call.block == 64 ? NAME##_int4_64##SUFFIX                   \
                                : NAME##_int4_128##SUFFIX;                 \
  }

GemvKernel kernel_of(const GemvCall& call) {
  const bool half = call.type == DataType::kFloat16;
  if (has_many_rows(call)) {
    if (half) MMI_CHOOSE_GEMV(gemv_float16, _rows)
    MMI_CHOOSE_GEMV(gemv_bfloat16, _rows)
  }
  if (half) MMI_CHOOSE_GEMV(gemv_float16, )
  MMI_CHOOSE_GEMV(gemv_bfloat16, )
}

}  // namespace

void preload_gemv() {
  cudaFuncAttributes attributes;
#define MMI_PRELOAD_GEMV(NAME, T, FORMAT)                                  \
  cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(NAME)); \
  cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(NAME##_rows));
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
