// The CUDA kernels of mmi::WeightOnlyMatMul for more rows than gemv.cuh takes: prefill, and batches
// of more than kGemvRows. Device code alone, of the same weights in the same order.
//
// A block computes kGemvRowTile rows of kGemvWarps tiles of output channels, a tile a warp. The
// rows of a step are staged in shared memory, twice, so that a step is loaded while another is
// multiplied; a weight goes from global memory to the registers of its warp, is dequantised there
// once for all rows of the block, and is never written.
#pragma once

#include "gemv.cuh"

namespace mmi {

constexpr int kGemvUnits = kGemvStep / 8;  // of 16 bytes, in a row of a step
// Units between rows: the eight lanes of a phase, two rows and four units, meet all banks once.
constexpr int kGemvRowPitch = kGemvUnits + 4;
constexpr int kGemvStage = kGemvRowTile * kGemvRowPitch;
// A row of outputs; eight more, so that the rows of a store begin in different banks.
constexpr int kGemvOutputPitch = kGemvWarps * kGemvOutputs + 8;
constexpr int kGemvTurns = kGemvRowTile * kGemvUnits / (kGemvWarps * kLanes);  // loads of a thread
static_assert(2 * kGemvRowTile * kGemvOutputPitch <= 2 * 16 * kGemvStage, "outputs fit the stages");

// A step of the weight: the words of a lane.
template <class Format>
MMI_DEVICE void load_step(unsigned (&words)[4 * Format::kLoads], const uint4* weight) {
#pragma unroll
  for (int load = 0; load < Format::kLoads; ++load) {
    const uint4 w = stream(weight + load * kLanes);
    words[4 * load] = w.x, words[4 * load + 1] = w.y;
    words[4 * load + 2] = w.z, words[4 * load + 3] = w.w;
  }
}

// Adds a step to the sums of a warp: [rows of eight][as in gemv.cuh]. rows: those that there are.
template <class T, class Format>
MMI_DEVICE void add_step(float (&sum)[kGemvRowTile / 8][4],
                         const unsigned (&words)[4 * Format::kLoads], const uint4* staged,
                         const unsigned* scales, int rows) {
  // Chunks that are dequantised together: those of a scale, else one.
  constexpr int kChunks = Format::kBlock == 0 ? 1 : Format::kBlock / kGemvChunk;
  constexpr int kBlocks = kGemvChunks / kChunks;
  unsigned pairs[kBlocks];
  if constexpr (Format::kBlock != 0) load_words(pairs, scales);
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    uint4 left[2 * kChunks];
#pragma unroll
    for (int i = 0; i < 2 * kChunks; ++i) {
      left[i] = left_factor<T, Format>(words, block * kChunks + i / 2, i % 2);
    }
#pragma unroll
    for (int eight = 0; eight < kGemvRowTile / 8; ++eight) {
      if (8 * eight >= rows) break;
      const uint4* row = staged + 8 * eight * kGemvRowPitch + 4 * block * kChunks;
      float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      float(&to)[4] = Format::kBlock == 0 ? sum[eight] : part;
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        const uint4 x = row[4 * chunk];
        multiply(T{}, to, left[2 * chunk], x.x, x.y);
        multiply(T{}, to, left[2 * chunk + 1], x.z, x.w);
      }
      if constexpr (Format::kBlock != 0) {
        const float low = to_float(T{static_cast<unsigned short>(pairs[block])});
        const float high = to_float(T{static_cast<unsigned short>(pairs[block] >> 16)});
        sum[eight][0] = fmaf(part[0], low, sum[eight][0]);
        sum[eight][1] = fmaf(part[1], low, sum[eight][1]);
        sum[eight][2] = fmaf(part[2], high, sum[eight][2]);
        sum[eight][3] = fmaf(part[3], high, sum[eight][3]);
      }
    }
  }
}

// The kernel. Grid (row tiles, groups of kGemvWarps tiles): the blocks that share weights follow one
// another, so that the second finds them in L2.
template <class T, class Format>
MMI_DEVICE void multiply_rows(const GemvParameters& call) {
  MMI_SHARED(uint4, staged, 2 * kGemvStage);
  constexpr int kStepUnits = Format::kLoads * kLanes;
  constexpr int kPairs = Format::kBlock == 0 ? 0 : 8 * kGemvStep / Format::kBlock;
  const int lane = lane_of(), warp = threadIdx.x / kLanes, g = lane / 4, t = lane % 4;
  const int last = (call.out - 1) / kGemvOutputs;
  const int tile = min(static_cast<int>(blockIdx.y * kGemvWarps) + warp, last);  // idle: repeats
  const int first = blockIdx.x * kGemvRowTile, rows = min(kGemvRowTile, call.rows - first);
  const uint4* weight =
      static_cast<const uint4*>(call.weight) + product(tile, call.steps) * kStepUnits + lane;
  const unsigned* scales = static_cast<const unsigned*>(call.scales) +
                           product(tile, call.steps) * kPairs + g * kPairs / 8;
  // What this thread stages: unit `unit` of rows `row`, `row` + 16, ... Rows beyond the last repeat
  // it; nobody reads their sums.
  const int unit = threadIdx.x % kGemvUnits, row = threadIdx.x / kGemvUnits;
  const uint4* input[kGemvTurns];
#pragma unroll
  for (int turn = 0; turn < kGemvTurns; ++turn) {
    const int from = first + min(row + turn * kGemvRowTile / kGemvTurns, rows - 1);
    input[turn] = static_cast<const uint4*>(call.input) + product(from, call.in) / 8 + unit;
  }
  uint4 x[kGemvTurns];
  const auto fetch = [&](int step) {
    const bool held = step * kGemvStep + 8 * unit < call.in;
#pragma unroll
    for (int turn = 0; turn < kGemvTurns; ++turn) {
      x[turn] = held ? __ldg(input[turn] + step * kGemvUnits) : make_uint4(0, 0, 0, 0);
    }
  };
  unsigned next[4 * Format::kLoads];
  float sum[kGemvRowTile / 8][4] = {};
  fetch(0);
  load_step<Format>(next, weight);
#pragma unroll 1
  for (int step = 0; step < call.steps; ++step) {
    uint4* stage = staged + (step & 1) * kGemvStage;
#pragma unroll
    for (int turn = 0; turn < kGemvTurns; ++turn) {
      stage[(row + turn * kGemvRowTile / kGemvTurns) * kGemvRowPitch + unit] = x[turn];
    }
    // Whoever still reads this stage is two steps behind, before the barrier of the last step.
    __syncthreads();
    unsigned words[4 * Format::kLoads];
#pragma unroll
    for (int i = 0; i < 4 * Format::kLoads; ++i) words[i] = next[i];
    weight += kStepUnits;
    if (step + 1 < call.steps) {
      fetch(step + 1);
      load_step<Format>(next, weight);
    }
    add_step<T, Format>(sum, words, stage + g * kGemvRowPitch + t, scales, rows);
    scales += kPairs;
  }
  __syncthreads();  // the stages become the outputs, [rows][output channels]
  T* outputs = reinterpret_cast<T*>(staged);
  float low = 1.0f, high = 1.0f;
  if constexpr (Format::kBlock == 0) {
    const T* of = static_cast<const T*>(call.scales);
    low = load(of + min(tile * kGemvOutputs + g, call.out - 1));
    high = load(of + min(tile * kGemvOutputs + g + 8, call.out - 1));
  }
#pragma unroll
  for (int eight = 0; eight < kGemvRowTile / 8; ++eight) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      T* to = outputs + (8 * eight + 2 * t + e) * kGemvOutputPitch + warp * kGemvOutputs + g;
      store_one(to, sum[eight][e] * low);
      store_one(to + 8, sum[eight][2 + e] * high);
    }
  }
  __syncthreads();
  constexpr int kWide = kGemvWarps * kGemvOutputs;
  const int channel = threadIdx.x % kWide, out = blockIdx.y * kWide + channel;
  if (out >= call.out) return;
  for (int each = threadIdx.x / kWide; each < rows; each += kGemvWarps * kLanes / kWide) {
    T* to = static_cast<T*>(call.output) + product(first + each, call.out) + out;
    *to = outputs[each * kGemvOutputPitch + channel];
  }
}

}  // namespace mmi

#define MMI_GEMV_ROWS_KERNEL(NAME, T, FORMAT)                                            \
  extern "C" __global__ void __launch_bounds__(mmi::kLanes* mmi::kGemvWarps, 2)          \
      NAME##_rows(const __grid_constant__ mmi::GemvParameters call) {                    \
    mmi::multiply_rows<T, FORMAT>(call);                                                 \
  }
