// Launch plan of mmi::WeightOnlyMatMul: kernel parameter, grid and limits. Host code without CUDA,
// shared by gemv.cu and the shim; mmi_plugins/gemv/launch_plan.py computes the same.
#pragma once

#include "gemv.h"
#include "gemv_parameters.h"
#include "plan.h"

namespace mmi {

inline GemvParameters gemv_parameters(const GemvCall& call) {
  return {call.input, call.weight, call.scales, call.output,
          call.rows,  call.in,     call.out,    static_cast<int>(gemv_steps(call.in))};
}

inline Grid gemv_grid(const GemvCall& call) {
  return {static_cast<unsigned>(gemv_tiles(call.out)), 1, 1, kGemvWarps * kLanes};
}

// Reason why the kernels cannot run a call, or nullptr: `invalid_reason`, the limits of counters
// and pointers.
inline const char* unsupported_reason(const GemvCall& call) {
  if (const char* reason = invalid_reason(call)) return reason;
  // Less than 2^31 by what a block, or its last turn of steps, may step beyond the end.
  if (call.in > kMaxCount - kGemvWarps * kGemvStep || call.out > kMaxCount) {
    return "more than 2^31 channels";
  }
  for (const void* pointer : {call.input, static_cast<const void*>(call.weight), call.scales,
                              static_cast<const void*>(call.output)}) {
    if (!pointer) return "a pointer is missing";
    if (!is_aligned(pointer, 16)) return "a pointer is not aligned to 16 bytes";
  }
  return nullptr;
}

}  // namespace mmi
