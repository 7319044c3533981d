// A tile on the CPU: every step is unpacked to float32 and multiplied with kGemvRows rows. Meant to be
// right on machines without a GPU; ONNX Runtime's own MatMulNBits is faster there.
#include "gemv_cpu.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "half.h"

namespace mmi {
namespace {

float float8_to_float(unsigned byte) {  // E4M3
  const int exponent = byte >> 3 & 15, part = byte & 7;
  const float size = exponent == 0 ? std::ldexp(static_cast<float>(part), -9)
                                   : std::ldexp(static_cast<float>(8 + part), exponent - 10);
  return byte & 0x80 ? -size : size;
}

struct Float8Table {
  float value[256];
  Float8Table() {
    for (unsigned byte = 0; byte < 256; ++byte) value[byte] = float8_to_float(byte);
  }
};

float widened(const GemvCall& call, const void* from, int64_t index) {
  uint16_t bits;
  std::memcpy(&bits, static_cast<const char*>(from) + 2 * index, sizeof bits);
  return call.type == DataType::kFloat16 ? half_to_float(bits) : bfloat16_to_float(bits);
}

// Numbers of one step of a tile, without their scales; order of a packed weight: gemv.cuh.
void unpack(WeightFormat format, const unsigned char* from, float (&to)[kGemvStep][kGemvOutputs]) {
  static const Float8Table float8;
  const int bytes = kGemvOutputs * kGemvStep / (format == WeightFormat::kInt4 ? 2 : 1);
  for (int place = 0; place < bytes; ++place) {
    const int load = place / 512, lane = place % 512 / 16, byte = place % 16;
    const int g = lane / 4, t = lane % 4;
    if (format == WeightFormat::kInt4) {
      const int word = byte / 4, first = kGemvChunk * (2 * load + word / 2) + 8 * t;
      for (int e = 0; e < 2; ++e) {
        const int nibble = 2 * (byte % 4) + e;
        to[first + 2 * (nibble % 4) + nibble / 4][g + 8 * (word % 2)] =
            static_cast<float>((from[place] >> 4 * e & 15) - 8);
      }
    } else {
      const int k = kGemvChunk * load + 8 * t + 4 * (byte / 8) + byte % 4;
      to[k][g + 8 * (byte / 4 % 2)] = format == WeightFormat::kInt8
                                          ? static_cast<float>(from[place] - 128)
                                          : float8.value[from[place]];
    }
  }
}

// Multiplies the numbers of a step by the scales of their blocks.
void scale(const GemvCall& call, int64_t first, float (&numbers)[kGemvStep][kGemvOutputs]) {
  const int blocks = kGemvStep / call.block;
  for (int channel = 0; channel < kGemvOutputs; ++channel) {
    for (int block = 0; block < blocks; ++block) {
      const int64_t pair = (first * 8 + channel % 8) * blocks + block;
      const float by = widened(call, call.scales, 2 * pair + channel / 8);
      for (int k = block * call.block; k < (block + 1) * call.block; ++k) numbers[k][channel] *= by;
    }
  }
}

}  // namespace

namespace {

// Rows of the call, kGemvRows at most.
void run_rows(const GemvCall& call, int64_t tile) {
  const int64_t steps = gemv_steps(call.in), bytes = int64_t{gemv_words(call.format)} * 4;
  float sums[kGemvRows][kGemvOutputs] = {}, numbers[kGemvStep][kGemvOutputs];
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t first = tile * steps + step;
    unpack(call.format, reinterpret_cast<const unsigned char*>(call.weight) + first * bytes,
           numbers);
    if (call.block != 0) scale(call, first, numbers);
    const int64_t start = step * kGemvStep;
    const int count = static_cast<int>(std::min<int64_t>(kGemvStep, call.in - start));
    for (int row = 0; row < call.rows; ++row) {
      for (int k = 0; k < count; ++k) {
        const float x = widened(call, call.input, int64_t{row} * call.in + start + k);
        for (int channel = 0; channel < kGemvOutputs; ++channel) {
          sums[row][channel] += x * numbers[k][channel];
        }
      }
    }
  }
  const int64_t first = tile * kGemvOutputs;
  const int count = static_cast<int>(std::min<int64_t>(kGemvOutputs, call.out - first));
  for (int row = 0; row < call.rows; ++row) {
    for (int channel = 0; channel < count; ++channel) {
      float sum = sums[row][channel];
      if (call.block == 0) sum *= widened(call, call.scales, first + channel);
      const uint16_t bits =
          call.type == DataType::kFloat16 ? float_to_half(sum) : float_to_bfloat16(sum);
      std::memcpy(static_cast<char*>(call.output) + 2 * (int64_t{row} * call.out + first + channel),
                  &bits, sizeof bits);
    }
  }
}

}  // namespace

void gemv_cpu_run(const GemvCall& call, int64_t tile) {
  for (int64_t row = 0; row < call.rows; row += kGemvRows) {
    GemvCall part = call;
    part.rows = static_cast<int32_t>(std::min<int64_t>(kGemvRows, call.rows - row));
    part.input = static_cast<const char*>(call.input) + 2 * row * call.in;
    part.output = static_cast<char*>(call.output) + 2 * row * call.out;
    run_rows(part, tile);
  }
}

}  // namespace mmi
