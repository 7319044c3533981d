// Launch plan of a call: kernel parameters, grids and workspace. Host code without CUDA, shared by
// mmfs.cu and the shim; launch_plan.py computes the same, and a test compares the bytes.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "mmfs.h"
#include "kernel_parameters.h"

namespace mmi {

static_assert(kMinUnsplitRows <= kMaxSplitBlocks, "every row that is split has a block");

struct Grid {
  unsigned x, y, z, threads;
};

inline int64_t rows_of(const MmfsCall& call) { return int64_t{call.b} * call.q * call.h; }

inline int value_bytes(const MmfsCall& call) { return call.type == DataType::kFloat32 ? 4 : 2; }

// Blocks that share a row; 0: each warp has a row, where rows are many. One block takes
// kSplitWarps * kSplitPairs (image, point) pairs: with fewer, the second launch that merges the
// blocks costs more than it saves.
inline int parts_of(const MmfsCall& call) {
  const int64_t rows = rows_of(call);
  if (rows >= kMinUnsplitRows) return 0;
  const int64_t pairs = int64_t{call.m} * call.p, block = kSplitWarps * kSplitPairs;
  return static_cast<int>(std::min((pairs + block - 1) / block, kMaxSplitBlocks / rows));
}

// Bytes of workspace for any call up to these sizes, so that it never shrinks when a size grows.
inline size_t plan_workspace_bytes(const MmfsCall& call) {
  const int64_t pairs = int64_t{call.m} * call.p, block = kSplitWarps * kSplitPairs;
  if (pairs <= block) return 0;
  const int64_t parts = (pairs + block - 1) / block;
  const int64_t blocks = std::min<int64_t>(parts * rows_of(call), kMaxSplitBlocks);
  return static_cast<size_t>(blocks) * (call.d + 2) * sizeof(float);
}

inline KernelParameters kernel_parameters(const MmfsCall& call, int parts, void* workspace) {
  KernelParameters parameters{};
  parameters.value = call.value;
  parameters.image_slot = call.image_slot;
  parameters.offsets = call.offsets;
  parameters.logits = call.logits;
  parameters.offset_table = call.offset_table;
  parameters.logit_table = call.logit_table;
  parameters.image_position = call.image_position;
  parameters.reference = call.reference;
  parameters.null_value = call.null_value;
  parameters.output = call.output;
  parameters.partial = static_cast<float*>(workspace);
  parameters.q = call.q, parameters.m = call.m, parameters.h = call.h, parameters.l = call.l;
  parameters.p = call.p, parameters.d = call.d, parameters.n = call.n, parameters.s = call.s;
  parameters.r = call.r;
  parameters.position_queries = call.position_queries;
  parameters.reference_queries = call.reference_queries;
  parameters.null_slot = call.null_slot;
  parameters.parts = parts;
  std::copy(call.level_height, call.level_height + call.l, parameters.level_height);
  std::copy(call.level_width, call.level_width + call.l, parameters.level_width);
  const double inverse = 1.0 / double{call.base_grid};
  parameters.inverse_grid = static_cast<float>(inverse);
  parameters.inverse_grid_rest = static_cast<float>(inverse - parameters.inverse_grid);
  return parameters;
}

// Whether the call takes a kernel for more than 64 channels per head.
inline bool is_wide(const MmfsCall& call) {
  return call.type != DataType::kFloat32 && call.d > 64;
}

inline Grid rows_grid(const MmfsCall& call) {
  const unsigned blocks = (call.q + kRowWarps - 1) / kRowWarps;
  return {blocks, unsigned(call.h), unsigned(call.b), kRowWarps * kLanes};
}
inline Grid split_grid(const MmfsCall& call, int parts) {
  return {unsigned(call.q) * parts, unsigned(call.h), unsigned(call.b), kSplitWarps * kLanes};
}
inline Grid merge_grid(const MmfsCall& call) {
  return {unsigned(call.q), unsigned(call.h), unsigned(call.b), kMaxChannels};
}

inline bool is_aligned(const void* pointer, size_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// Reason why the CUDA kernels cannot run a call, or nullptr: `invalid_reason`, the limits of
// addresses and grids, and pointers.
inline const char* unsupported_reason(const MmfsCall& call) {
  if (const char* reason = invalid_reason(call)) return reason;
  const int64_t units = int64_t{call.h} * call.d * value_bytes(call) / 16;  // of 16 bytes, a cell
  if (int64_t{call.n} * call.s > (int64_t{1} << 32) / units) {
    return "value is larger than 64 GiB";
  }
  // 64 less than 2^31, so that kernels may step beyond the last row or image within 32 bits.
  if (rows_of(call) > kMaxCount) return "more than 2^31 - 64 output rows";
  if (call.m > kMaxCount) return "more than 2^31 - 64 images";
  const int64_t table = int64_t{call.h} * call.p * std::max(call.l, 2);  // numbers of a table row
  if (table > INT32_MAX / call.r) return "more than 2^31 numbers in a table";
  if (call.h > kMaxGridYZ || call.b > kMaxGridYZ) return "more than 65535 heads or batch rows";
  const void* const wide[] = {call.value,       call.offsets,    call.logits, call.offset_table,
                              call.logit_table, call.null_value, call.output};
  for (const void* pointer : wide) {
    if (!pointer) return "a pointer is missing";
    if (!is_aligned(pointer, 16)) return "a pointer is not aligned to 16 bytes";
  }
  for (const void* pointer : {call.image_slot, call.image_position}) {
    if (!pointer) return "a pointer to indices is missing";
    if (!is_aligned(pointer, 4)) return "a pointer to indices is not aligned to 4 bytes";
  }
  if (!call.reference) return "the pointer to reference points is missing";
  if (!is_aligned(call.reference, 8)) {
    return "the pointer to reference points is not aligned to 8 bytes";
  }
  return nullptr;
}

}  // namespace mmi
