// One call of mmi::MultiImageDeformableAttention, version 1: the input of every implementation.
//
// Letters: b batch, q queries, m image slots, l levels, h heads, p points, d channels per head,
// n encoded images, s feature cells, r table rows.
#pragma once

#include <cfloat>
#include <cstdint>

#include "constants.h"
#include "data_type.h"

namespace mmi {

// Pointers, sizes and attributes of one call; n encoded images are the pool.
struct MmfsCall {
  DataType type;                  // of value, offsets, logits and output
  const void* value;              // [n, s, h, d]
  const int32_t* image_slot;      // [b, m], image of the pool
  const void* offsets;            // [b, q, h, p, 2], x first
  const void* logits;             // [b, q, h, l, p]
  const float* offset_table;      // [r, h, p, 2]
  const float* logit_table;       // [r, h, l, p]
  const int32_t* image_position;  // [b, position_queries, m]; 0 hidden, 1 nearest
  const float* reference;         // [reference_queries, 2], in [0, 1]
  const float* null_value;        // [h, d]
  void* output;                   // [b, q, h * d]
  int32_t b, q, m, h, l, p, d, n, s, r;
  int32_t position_queries;       // q, or 1: the same for all
  int32_t reference_queries;      // q, or 1
  int32_t level_height[kMaxLevels], level_width[kMaxLevels];
  float base_grid;
  bool null_slot;
};

// Reason why the sizes and attributes of a call are invalid, or nullptr. Checks no pointer.
inline const char* invalid_reason(const MmfsCall& call) {
  const int32_t sizes[] = {call.b, call.q, call.m, call.h, call.l,
                           call.p, call.d, call.n, call.s, call.r};
  for (int32_t size : sizes) {
    if (size < 1) return "an axis is empty";
  }
  if (call.l > kMaxLevels) return "more than 4 levels";
  if (call.p > kMaxPoints) return "more than 16 points";
  if (call.d > kMaxChannels || call.d % kChannelStep != 0) {
    return "the head size is not a multiple of 8 up to 128";
  }
  if (call.position_queries != 1 && call.position_queries != call.q) {
    return "image_position has neither one row nor one for each query";
  }
  if (call.reference_queries != 1 && call.reference_queries != call.q) {
    return "reference has neither one row nor one for each query";
  }
  uint64_t cells = 0;  // the sum of four levels of 2^62 cells fits
  for (int32_t level = 0; level < call.l; ++level) {
    if (call.level_height[level] < 1 || call.level_width[level] < 1) return "a level is empty";
    cells += uint64_t(call.level_height[level]) * uint64_t(call.level_width[level]);
  }
  if (cells != uint64_t(call.s)) return "the levels do not make up the feature cells of value";
  if (!(call.base_grid > 0 && call.base_grid <= FLT_MAX)) return "base_grid is not positive";
  return nullptr;
}

}  // namespace mmi
