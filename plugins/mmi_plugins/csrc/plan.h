// From a call to kernel launches: host code without CUDA, shared by mmfs.cu and the shim.
// launch_plan.py says the same in Python; a test compares the two byte by byte.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "mmfs.h"
#include "problem.h"

namespace mmi {

static_assert(kMaximumLevels == kMostLevels && kMaximumChannels == kMostChannels, "one limit");
static_assert(kManyRows <= kMostBlocks, "every row that is split has a block");

struct Grid {
  unsigned x, y, z, threads;
};

inline int64_t rows_of(const Attention& call) { return int64_t{call.b} * call.q * call.h; }

inline int value_bytes(const Attention& call) { return call.type == DataType::kFloat32 ? 4 : 2; }

// 0: queries are many and each warp has a row. Else the blocks that share a row: one for every
// kSplitWarps * kSplitPairs (image, point) pairs, since a second launch to merge them costs more
// than it saves below that.
inline int parts_of(const Attention& call) {
  const int64_t rows = rows_of(call);
  if (rows >= kManyRows) return 0;
  const int64_t pairs = int64_t{call.m} * call.p, block = kSplitWarps * kSplitPairs;
  return static_cast<int>(std::min((pairs + block - 1) / block, kMostBlocks / rows));
}

// Of the largest case within these sizes, so that it never shrinks when a call grows.
inline size_t plan_bytes(const Attention& call) {
  const int64_t pairs = int64_t{call.m} * call.p, block = kSplitWarps * kSplitPairs;
  if (pairs <= block) return 0;
  const int64_t parts = (pairs + block - 1) / block;
  const int64_t blocks = std::min<int64_t>(parts * rows_of(call), kMostBlocks);
  return static_cast<size_t>(blocks) * (call.d + 2) * sizeof(float);
}

inline Problem problem_of(const Attention& call, int parts, void* workspace) {
  Problem problem{};
  problem.value = call.value;
  problem.image_slot = call.image_slot;
  problem.offsets = call.offsets;
  problem.logits = call.logits;
  problem.offset_table = call.offset_table;
  problem.logit_table = call.logit_table;
  problem.image_position = call.image_position;
  problem.reference = call.reference;
  problem.null_value = call.null_value;
  problem.output = call.output;
  problem.partial = static_cast<float*>(workspace);
  problem.q = call.q, problem.m = call.m, problem.h = call.h, problem.l = call.l;
  problem.p = call.p, problem.d = call.d, problem.n = call.n, problem.s = call.s;
  problem.r = call.r;
  problem.position_queries = call.position_queries;
  problem.reference_queries = call.reference_queries;
  problem.null_slot = call.null_slot;
  problem.parts = parts;
  std::copy(call.level_height, call.level_height + call.l, problem.level_height);
  std::copy(call.level_width, call.level_width + call.l, problem.level_width);
  const double inverse = 1.0 / double{call.base_grid};
  problem.inverse_grid = static_cast<float>(inverse);
  problem.inverse_grid_rest = static_cast<float>(inverse - problem.inverse_grid);
  return problem;
}

// Whether a kernel for more than 64 channels is wanted.
inline bool is_wide(const Attention& call) {
  return call.type != DataType::kFloat32 && call.d > 64;
}

inline Grid rows_grid(const Attention& call) {
  const unsigned blocks = (call.q + kRowWarps - 1) / kRowWarps;
  return {blocks, unsigned(call.h), unsigned(call.b), kRowWarps * kLanes};
}
inline Grid split_grid(const Attention& call, int parts) {
  return {unsigned(call.q) * parts, unsigned(call.h), unsigned(call.b), kSplitWarps * kLanes};
}
inline Grid merge_grid(const Attention& call) {
  return {unsigned(call.q), unsigned(call.h), unsigned(call.b), kMaximumChannels};
}

inline bool is_aligned(const void* pointer, size_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// Why the kernels cannot take a call, or nullptr: `refusal`, and what addresses and grids can hold.
inline const char* plan_refusal(const Attention& call) {
  if (const char* reason = refusal(call)) return reason;
  const int64_t units = int64_t{call.h} * call.d * value_bytes(call) / 16;  // of 16 bytes, a cell
  if (int64_t{call.n} * call.s > (int64_t{1} << 32) / units) {
    return "value is larger than 64 GiB";
  }
  // A little less, so that kernels may count rows and images in steps and stay within 32 bits.
  if (rows_of(call) > kMostCounted) return "more than 2^31 - 64 output rows";
  if (call.m > kMostCounted) return "more than 2^31 - 64 images";
  const int64_t table = int64_t{call.h} * call.p * std::max(call.l, 2);  // numbers of a table row
  if (table > INT32_MAX / call.r) return "more than 2^31 numbers in a table";
  if (call.h > kMostGrid || call.b > kMostGrid) return "more than 65535 heads or batch rows";
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
