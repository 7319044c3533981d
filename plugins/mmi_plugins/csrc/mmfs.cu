// The kernels of every type, and the launch of a call on a stream.
#include <cuda_runtime_api.h>

#include "mmfs.cuh"
#include "launch.h"
#include "plan.h"

MMI_ROWS_AND_SPLITS(MMI_ROWS_KERNEL)
MMI_ROWS_AND_SPLITS(MMI_SPLIT_KERNEL)
MMI_MERGES(MMI_MERGE_KERNEL)

namespace mmi {
namespace {

using Kernel = void (*)(KernelParameters);

struct Kernels {
  Kernel rows, split, merge;
};

Kernels kernels_of(const MmfsCall& call) {
  const bool wide = is_wide(call);
  switch (call.type) {
    case DataType::kFloat16:
      return wide ? Kernels{mmfs_float16_wide_rows, mmfs_float16_wide_split, mmfs_float16_merge}
                  : Kernels{mmfs_float16_rows, mmfs_float16_split, mmfs_float16_merge};
    case DataType::kBFloat16:
      return wide ? Kernels{mmfs_bfloat16_wide_rows, mmfs_bfloat16_wide_split, mmfs_bfloat16_merge}
                  : Kernels{mmfs_bfloat16_rows, mmfs_bfloat16_split, mmfs_bfloat16_merge};
    default:
      return {mmfs_float32_rows, mmfs_float32_split, mmfs_float32_merge};
  }
}

const char* start(Kernel kernel, Grid grid, KernelParameters parameters, cudaStream_t stream) {
  void* arguments[] = {&parameters};
  const cudaError_t error =
      cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(grid.x, grid.y, grid.z),
                       dim3(grid.threads), arguments, 0, stream);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

size_t workspace_bytes(const MmfsCall& call) { return plan_workspace_bytes(call); }

void preload() {
  cudaFuncAttributes attributes;
#define MMI_PRELOAD(KERNEL) \
  cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(KERNEL));
#define MMI_PRELOAD_BOTH(NAME, T, WIDE) MMI_PRELOAD(NAME##_rows) MMI_PRELOAD(NAME##_split)
#define MMI_PRELOAD_MERGE(NAME, T, WIDE) MMI_PRELOAD(NAME##_merge)
  MMI_ROWS_AND_SPLITS(MMI_PRELOAD_BOTH)
  MMI_MERGES(MMI_PRELOAD_MERGE)
  cudaGetLastError();  // clears the error: `launch` reports it where it matters
}

const char* launch(const MmfsCall& call, void* workspace, CUstream_st* stream) {
  if (const char* reason = unsupported_reason(call)) return reason;
  const int parts = parts_of(call);
  if (parts > 1 && (!workspace || !is_aligned(workspace, 16))) {
    return "the workspace is missing or not aligned to 16 bytes";
  }
  const KernelParameters parameters = kernel_parameters(call, parts, workspace);
  const Kernels kernels = kernels_of(call);
  if (parts == 0) return start(kernels.rows, rows_grid(call), parameters, stream);
  if (const char* error = start(kernels.split, split_grid(call, parts), parameters, stream)) {
    return error;
  }
  return parts == 1 ? nullptr : start(kernels.merge, merge_grid(call), parameters, stream);
}

}  // namespace mmi
