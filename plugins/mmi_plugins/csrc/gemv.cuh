// The CUDA kernels of mmi::WeightOnlyMatMul for decoding, up to kGemvRows rows of activations times a
// weight in int8, float8 or int4: device code alone, for nvcc, NVRTC and, with MMI_SHIM, g++. More
// rows: gemv_rows.cuh. See docs/gemv_kernel.md.
//
// A block computes kGemvOutputs output channels of all rows, and its warps share the steps of
// kGemvStep input channels. The weight is the left factor of a tensor-core product and the rows are
// the columns of its right factor, so that eight rows cost no more instructions than one.
//
// Order of a packed weight. A chunk is kGemvChunk input channels. Lane 4 g + t holds, of output
// channels g and g + 8 of a tile, input channels 8 t .. 8 t + 7 of every chunk of a step. Both
// factors have these channels in the same order, so the sum is that of the product. 16 bytes are
//   8 bits: one chunk; words [input channels 8 t + 4 i .. + 3 for i = 0, 1][g, g + 8]
//   4 bits: two chunks; words [chunk][g, g + 8], input channel 8 t + 2 p + e in nibble p + 4 e
// and load j of a step holds chunk j, or chunks 2 j and 2 j + 1. Input channels from `in` up to a
// whole step and output channels from `out` up to a whole tile have number 0 and scale 0.
#pragma once

#include "dequantise.cuh"
#include "device.cuh"
#include "gemv_parameters.h"

namespace mmi {

constexpr int kGemvChunks = kGemvStep / kGemvChunk;  // of a step
// Floats between rows of partial sums: lanes of a warp write to different banks.
constexpr int kGemvPitch = kGemvOutputs + 4;
constexpr int kGemvBlocks = 4;  // resident on an SM: 64 registers a thread

// Left factor of product i, 0 or 1, of a chunk.
template <class T, class Format>
MMI_DEVICE uint4 left_factor(const unsigned (&words)[4 * Format::kLoads], int chunk, int i) {
  if constexpr (Format::kLoads == kGemvChunks) {
    const unsigned low = words[4 * chunk + 2 * i], high = words[4 * chunk + 2 * i + 1];
    return {pair_of(T{}, Format{}, low, 0), pair_of(T{}, Format{}, high, 0),
            pair_of(T{}, Format{}, low, 1), pair_of(T{}, Format{}, high, 1)};
  } else {
    const unsigned low = words[2 * chunk], high = words[2 * chunk + 1];
    return {pair_of(T{}, Format{}, low, 2 * i), pair_of(T{}, Format{}, high, 2 * i),
            pair_of(T{}, Format{}, low, 2 * i + 1), pair_of(T{}, Format{}, high, 2 * i + 1)};
  }
}

// Scales of a step's blocks for output channels g and g + 8 of a lane, two a word.
MMI_DEVICE void load_words(unsigned (&to)[1], const unsigned* from) { to[0] = __ldg(from); }
MMI_DEVICE void load_words(unsigned (&to)[2], const unsigned* from) {
  const uint2 x = __ldg(reinterpret_cast<const uint2*>(from));
  to[0] = x.x, to[1] = x.y;
}
MMI_DEVICE void load_words(unsigned (&to)[4], const unsigned* from) {
  const uint4 x = __ldg(reinterpret_cast<const uint4*>(from));
  to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
}

// Adds products of `count` chunks to `sum`: [output channels g, g + 8][rows 2 t, 2 t + 1].
template <class T, class Format>
MMI_DEVICE void add_chunks(float (&sum)[4], const unsigned (&words)[4 * Format::kLoads],
                           const uint4 (&input)[kGemvChunks], int first, int count) {
#pragma unroll
  for (int chunk = first; chunk < first + count; ++chunk) {
    const uint4 x = input[chunk];
    multiply(T{}, sum, left_factor<T, Format>(words, chunk, 0), x.x, x.y);
    multiply(T{}, sum, left_factor<T, Format>(words, chunk, 1), x.z, x.w);
  }
}

// Adds a step whose blocks have the scales at `scales`, [block][g, g + 8].
template <class T, class Format>
MMI_DEVICE void add_blocks(float (&sum)[4], const unsigned (&words)[4 * Format::kLoads],
                           const uint4 (&input)[kGemvChunks], const unsigned* scales) {
  constexpr int kBlocks = kGemvStep / Format::kBlock, kChunks = kGemvChunks / kBlocks;
  unsigned pairs[kBlocks];
  load_words(pairs, scales);
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    add_chunks<T, Format>(part, words, input, block * kChunks, kChunks);
    const float low = to_float(T{static_cast<unsigned short>(pairs[block])});
    const float high = to_float(T{static_cast<unsigned short>(pairs[block] >> 16)});
    sum[0] = fmaf(part[0], low, sum[0]);
    sum[1] = fmaf(part[1], low, sum[1]);
    sum[2] = fmaf(part[2], high, sum[2]);
    sum[3] = fmaf(part[3], high, sum[3]);
  }
}

// The kernel. Grid (tiles).
template <class T, class Format>
MMI_DEVICE void multiply_weight(const GemvParameters& call) {
  MMI_SHARED(float, partial, kGemvWarps * kGemvRows * kGemvPitch);
  constexpr int kUnits = Format::kLoads * kLanes;  // of 16 bytes, a step
  constexpr int kPairs = Format::kBlock == 0 ? 0 : 8 * kGemvStep / Format::kBlock;  // of scales
  const int lane = lane_of(), warp = threadIdx.x / kLanes, g = lane / 4, t = lane % 4;
  const unsigned long long first = product(blockIdx.x, call.steps) + warp;
  const uint4* weight = static_cast<const uint4*>(call.weight) + first * kUnits + lane;
  const unsigned* scales =
      static_cast<const unsigned*>(call.scales) + first * kPairs + g * kPairs / 8;
  // Columns without a row repeat the last one; nobody reads their sums.
  const uint4* input = static_cast<const uint4*>(call.input) +
                       (product(min(g, call.rows - 1), call.in) + warp * kGemvStep) / 8 + t;
  float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 1
  for (int step = warp; step < call.steps; step += kGemvWarps) {
    unsigned words[4 * Format::kLoads];
#pragma unroll
    for (int load = 0; load < Format::kLoads; ++load) {
      const uint4 w = stream(weight + load * kLanes);
      words[4 * load] = w.x, words[4 * load + 1] = w.y;
      words[4 * load + 2] = w.z, words[4 * load + 3] = w.w;
    }
    uint4 x[kGemvChunks];
    const int left = call.in - step * kGemvStep;
    if (left >= kGemvStep) {
#pragma unroll
      for (int chunk = 0; chunk < kGemvChunks; ++chunk) x[chunk] = __ldg(input + 4 * chunk);
    } else {  // the last step, of one to three chunks
      x[0] = __ldg(input);
#pragma unroll
      for (int chunk = 1; chunk < kGemvChunks; ++chunk) {
        const bool held = chunk < kGemvChunks - 1 && chunk * kGemvChunk < left;
        x[chunk] = held ? __ldg(input + 4 * chunk) : make_uint4(0, 0, 0, 0);
      }
    }
    if constexpr (Format::kBlock == 0) {
      add_chunks<T, Format>(sum, words, x, 0, kGemvChunks);
    } else {
      add_blocks<T, Format>(sum, words, x, scales);
    }
    weight += kGemvWarps * kUnits;
    scales += kGemvWarps * kPairs;
    input += kGemvWarps * kGemvStep / 8;
  }
  float* mine = partial + warp * kGemvRows * kGemvPitch + 2 * t * kGemvPitch + g;
  mine[0] = sum[0], mine[kGemvPitch] = sum[1];
  mine[8] = sum[2], mine[kGemvPitch + 8] = sum[3];
  __syncthreads();
  const int row = threadIdx.x / kGemvOutputs, channel = threadIdx.x % kGemvOutputs;
  const int out = blockIdx.x * kGemvOutputs + channel;
  if (row >= call.rows || out >= call.out) return;
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kGemvWarps; ++i) {
    total += partial[(i * kGemvRows + row) * kGemvPitch + channel];
  }
  if (Format::kBlock == 0) total *= load(static_cast<const T*>(call.scales) + out);
  store_one(static_cast<T*>(call.output) + product(row, call.out) + out, total);
}

}  // namespace mmi

#define MMI_GEMV_KERNEL(NAME, T, FORMAT)                                                 \
  extern "C" __global__ void __launch_bounds__(mmi::kLanes* mmi::kGemvWarps,             \
                                               mmi::kGemvBlocks)                         \
      NAME(const __grid_constant__ mmi::GemvParameters call) {                           \
    mmi::multiply_weight<T, FORMAT>(call);                                               \
  }

// Every kernel: X(NAME, T, FORMAT).
#define MMI_GEMV_FORMATS(X, NAME, T)        \
  X(NAME##_int8, T, mmi::Int8)              \
  X(NAME##_fp8, T, mmi::Fp8)                \
  X(NAME##_int4_32, T, mmi::Int4<32>)       \
  X(NAME##_int4_64, T, mmi::Int4<64>)       \
  X(NAME##_int4_128, T, mmi::Int4<128>)
#define MMI_GEMVS(X)                                   \
  MMI_GEMV_FORMATS(X, gemv_float16, mmi::Half)         \
  MMI_GEMV_FORMATS(X, gemv_bfloat16, mmi::BFloat16)
