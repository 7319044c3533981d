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

// Whether the kernels of gemv_rows.cuh run a call, or those of decoding.
inline bool has_many_rows(const GemvCall& call) { return call.rows > kGemvRows; }

inline Grid gemv_grid(const GemvCall& call) {
  const auto over = [](int64_t count, int64_t each) {
    return static_cast<unsigned>((count + each - 1) / each);
  };
  const int64_t tiles = gemv_tiles(call.out);
  if (!has_many_rows(call)) return {static_cast<unsigned>(tiles), 1, 1, kGemvWarps * kLanes};
  return {over(call.rows, kGemvRowTile), over(tiles, kGemvWarps), 1, kGemvWarps * kLanes};
}

// Reason why the kernels cannot run a call, or nullptr: `invalid_reason`, the limits of counters
// and pointers.
inline const char* unsupported_reason(const GemvCall& call) {
  if (const char* reason = invalid_reason(call)) return reason;
  // Less than 2^31 by what a block, or its last turn of steps, may step beyond the end.
  if (call.in > kMaxCount - kGemvWarps * kGemvStep || call.out > kMaxCount) {
    return "more than 2^31 channels";
  }
  if (call.rows > kMaxCount) return "more than 2^31 rows";
  if (has_many_rows(call) && gemv_grid(call).y > kMaxGridYZ) return "more than 2^23 output channels";
  for (const void* pointer : {call.input, static_cast<const void*>(call.weight), call.scales,
                              static_cast<const void*>(call.output)}) {
    if (!pointer) return "a pointer is missing";
    if (!is_aligned(pointer, 16)) return "a pointer is not aligned to 16 bytes";
  }
  return nullptr;
}

}  // namespace mmi
