// The parameter of the CUDA kernels. Compiles under nvcc, NVRTC and any C++17 compiler;
// launch_plan.py packs the same bytes in Python.
#pragma once

#include "constants.h"

namespace mmi {

struct Half { unsigned short bits; };
struct BFloat16 { unsigned short bits; };

// The parameter of every kernel, passed by value. Letters as in mmfs.h.
struct KernelParameters {
  const void* value;          // [n, s, h, d]
  const int* image_slot;      // [b, m]
  const void* offsets;        // [b, q, h, p, 2]
  const void* logits;         // [b, q, h, l, p]
  const float* offset_table;  // [r, h, p, 2]
  const float* logit_table;   // [r, h, l, p]
  const int* image_position;  // [b, position_queries, m]
  const float* reference;     // [reference_queries, 2]
  const float* null_value;    // [h, d]
  void* output;               // [b, q, h * d]
  float* partial;             // [b, q, h, parts, d + 2]; unused unless parts > 1
  int q, m, h, l, p, d, n, s, r;
  int position_queries, reference_queries;
  int null_slot;
  int parts;                  // blocks that share a row; 0: every warp has a row of its own
  int level_height[kMaxLevels], level_width[kMaxLevels];
  float inverse_grid, inverse_grid_rest;  // their sum is 1 / base_grid to 48 bits
};

}  // namespace mmi
