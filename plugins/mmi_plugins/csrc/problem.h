// What the host hands to the CUDA kernels, and the sizes both sides must agree on. Compiles under
// nvcc, NVRTC and any C++17 compiler; launch_plan.py reads the constants from here.
#pragma once

namespace mmi {

constexpr int kLanes = 32;
constexpr int kRowWarps = 4;          // rows of a block where queries are many
constexpr int kSplitWarps = 8;        // shares of a row of a block where queries are few
constexpr int kSplitPairs = 4;        // (image, point) pairs that a warp then takes at a time
constexpr int kMaximumLevels = 4;     // kMostLevels and kMostChannels of mmfs.h
constexpr int kMaximumChannels = 128;
constexpr int kManyRows = 2048;       // from this many (b, q, h) on, a warp a row fills a GPU
constexpr int kMostBlocks = 2048;     // a split makes no more blocks than this
constexpr int kMostGrid = 65535;      // CUDA's limit for heads and batch, axes y and z of a grid
constexpr int kMostCounted = 2147483584;  // rows and images: 2^31 - 64

struct Half { unsigned short bits; };
struct BFloat16 { unsigned short bits; };

// The parameter of every kernel. Letters as in mmfs.h; a block takes one head and one b.
struct Problem {
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
  float* partial;             // [b, q, h, parts, d + 2]; unused where parts is 1
  int q, m, h, l, p, d, n, s, r;
  int position_queries, reference_queries;
  int null_slot;
  int parts;                  // blocks that share a row; 0: a warp has a row of its own
  int level_height[kMaximumLevels], level_width[kMaximumLevels];
  float inverse_grid, inverse_grid_rest;  // their sum is 1 / base_grid to 48 bits
};

}  // namespace mmi
