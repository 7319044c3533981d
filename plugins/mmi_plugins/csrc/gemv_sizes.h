// Shape inference of mmi::WeightOnlyMatMul: a call from attributes and the shapes of its inputs, or
// how they conflict. An axis that is kUnknown while an engine is built counts as one row.
#pragma once

#include <algorithm>
#include <string>

#include "gemv.h"
#include "sizes.h"

namespace mmi {

constexpr int32_t kGemvInputs = 3;
constexpr const char* kGemvInputNames[kGemvInputs] = {"input", "weight", "scales"};

struct GemvAttributes {
  int32_t format = 0, out = 0, block = 0;  // format: a WeightFormat
};

class GemvSizes {
 public:
  // Sizes of the call that `inputs` and `attributes` make; `fits()` tells whether there is one.
  GemvSizes(const GemvAttributes& attributes, const Shape (&inputs)[kGemvInputs]) {
    const Shape& input = inputs[0];
    call_.type = DataType::kFloat16;  // the caller sets the type that there is
    call_.format = static_cast<WeightFormat>(attributes.format);
    call_.out = attributes.out;
    call_.block = attributes.block;
    if (input.rank < 1 || input.rank > kMaxRank) {
      refuse("wrong rank of input", 1, input.rank);
      return;
    }
    int64_t rows = 1;
    for (int32_t axis = 0; axis + 1 < input.rank && rows <= INT32_MAX; ++axis) {
      if (input.side[axis] != kUnknown) rows *= input.side[axis];
    }
    call_.rows = static_cast<int32_t>(std::min<int64_t>(rows, INT32_MAX));
    const int64_t channels = input.side[input.rank - 1];
    call_.in = static_cast<int32_t>(std::min<int64_t>(channels, INT32_MAX));
    if (channels == kUnknown) {
      reason_ = "the input channels are not known";
      return;
    }
    if (const char* reason = invalid_reason(call_)) {
      reason_ = reason;
      return;
    }
    const int64_t tiles = gemv_tiles(call_.out), steps = gemv_steps(call_.in);
    const Shape weight{3, {tiles, steps, gemv_words(call_.format)}};
    Shape scales{1, {call_.out}};
    if (call_.block != 0) scales = {5, {tiles, steps, 8, kGemvStep / call_.block, 2}};
    fits_ = equal(1, weight, inputs[1]) && equal(2, scales, inputs[2]);
  }

  bool fits() const { return fits_; }
  const std::string& reason() const { return reason_; }
  // The call with sizes and attributes; the caller fills in the type and the pointers.
  GemvCall& call() { return call_; }

 private:
  bool equal(int32_t input, const Shape& wanted, const Shape& got) {
    const std::string name = kGemvInputNames[input];
    if (got.rank != wanted.rank) return refuse("wrong rank of " + name, wanted.rank, got.rank);
    for (int32_t axis = 0; axis < wanted.rank; ++axis) {
      if (got.side[axis] != kUnknown && got.side[axis] != wanted.side[axis]) {
        return refuse("axis " + std::to_string(axis) + " of " + name, wanted.side[axis],
                      got.side[axis]);
      }
    }
    return true;
  }

  bool refuse(const std::string& what, int64_t expected, int64_t got) {
    reason_ = what + "; expected " + std::to_string(expected) + ", got " + std::to_string(got);
    return false;
  }

  GemvCall call_{};
  bool fits_ = false;
  std::string reason_;
};

}  // namespace mmi
