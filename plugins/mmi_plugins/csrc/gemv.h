// One call of mmi::WeightOnlyMatMul, version 1: the input of every implementation.
#pragma once

#include <cstddef>
#include <cstdint>

#include "constants.h"
#include "data_type.h"

namespace mmi {

enum class WeightFormat : int32_t { kInt8 = 0, kFp8 = 1, kInt4 = 2 };

// Pointers, sizes and attributes of one call. The order of a packed weight: gemv.cuh.
struct GemvCall {
  DataType type;         // of input, scales and output: float16 or bfloat16
  WeightFormat format;
  const void* input;     // [rows, in]
  const int32_t* weight;  // [tiles, steps, words]
  const void* scales;    // [out]; with blocks [tiles, steps, 8, kGemvStep / block, 2]
  void* output;          // [rows, out]
  int32_t rows, in, out;
  int32_t block;         // input channels that share a scale; 0: all of an output channel
};

inline int64_t gemv_tiles(int32_t out) { return (int64_t{out} + kGemvOutputs - 1) / kGemvOutputs; }
inline int64_t gemv_steps(int32_t in) { return (int64_t{in} + kGemvStep - 1) / kGemvStep; }
// Words of 32 bits of the weight, in a tile and step.
inline int32_t gemv_words(WeightFormat format) {
  return kGemvOutputs * kGemvStep * (format == WeightFormat::kInt4 ? 4 : 8) / 32;
}

// Reason why the sizes and attributes of a call are invalid, or nullptr. Checks no pointer.
inline const char* invalid_reason(const GemvCall& call) {
  if (call.type != DataType::kFloat16 && call.type != DataType::kBFloat16) {
    return "activations are neither float16 nor bfloat16";
  }
  const bool int4 = call.format == WeightFormat::kInt4;
  if (!int4 && call.format != WeightFormat::kInt8 && call.format != WeightFormat::kFp8) {
    return "the weight is neither int8, float8 nor int4";
  }
  if (call.rows < 1) return "there are no rows";
  if (call.in < 1 || call.in % kGemvChunk != 0) {
    return "input channels are not a multiple of 32";
  }
  if (call.out < 1) return "there are no output channels";
  if (!int4) return call.block == 0 ? nullptr : "int8 and float8 have no blocks";
  if (call.block != 32 && call.block != 64 && call.block != 128) {
    return "a block of int4 is not 32, 64 or 128";
  }
  return call.in % call.block == 0 ? nullptr : "input channels are not a multiple of the block";
}

}  // namespace mmi
