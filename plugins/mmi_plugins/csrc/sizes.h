// Shape inference: the sizes of a call from the shapes of its inputs, or how the shapes conflict.
//
// While an engine is built, some axes are known only as ranges. An unknown axis counts as the
// smallest size allowed, so that everything else is checked before the build. Letters as in mmfs.h.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>

#include "mmfs.h"

namespace mmi {

constexpr int32_t kInputs = 9;
enum Input : int32_t {
  kValue,
  kImageSlot,
  kOffsets,
  kLogits,
  kOffsetTable,
  kLogitTable,
  kImagePosition,
  kReference,
  kNullValue
};
constexpr const char* kInputNames[kInputs] = {
    "value",       "image_slot",     "offsets",   "logits",    "offset_table",
    "logit_table", "image_position", "reference", "null_value"};
// A letter an axis; `*` is 1 (shared by all queries) or q.
constexpr const char* kInputAxes[kInputs] = {"nshd", "bm",  "bqhp2", "bqhlp", "rhp2",
                                             "rhlp", "b*m", "*2",    "hd"};
constexpr int32_t kMaxRank = 8;
constexpr int64_t kUnknown = -1;

struct Attributes {
  int32_t levels = 0;
  int32_t level_height[kMaxLevels] = {}, level_width[kMaxLevels] = {};
  float base_grid = 0;
  int32_t null_slot = 0;
};

struct Shape {
  int32_t rank = 0;
  int64_t side[kMaxRank] = {};  // kUnknown for an axis known only at run time
};

class Sizes {
 public:
  explicit Sizes(const Attributes& attributes) {
    call_.b = call_.q = call_.m = call_.h = call_.p = call_.n = call_.r = 1;
    call_.d = kChannelStep;
    call_.l = attributes.levels;
    uint64_t cells = 0;
    for (int32_t level = 0; level < attributes.levels; ++level) {
      call_.level_height[level] = attributes.level_height[level];
      call_.level_width[level] = attributes.level_width[level];
      cells += uint64_t(attributes.level_height[level]) * uint64_t(attributes.level_width[level]);
    }
    call_.s = cells > INT32_MAX ? INT32_MAX : static_cast<int32_t>(cells);
    call_.base_grid = attributes.base_grid;
    call_.null_slot = attributes.null_slot != 0;
  }

  // Takes the shape of one input. Returns false, with a `reason()`, where the shape conflicts with
  // the attributes or an earlier input.
  bool take(int32_t input, const Shape& shape) {
    const char* axes = kInputAxes[input];
    const auto rank = static_cast<int32_t>(std::strlen(axes));
    if (shape.rank != rank) {
      return refuse(std::string("wrong rank of ") + kInputNames[input], rank, shape.rank);
    }
    for (int32_t axis = 0; axis < rank; ++axis) {
      const int64_t side = shape.side[axis];
      if (side == kUnknown) continue;
      if (side < 1 || side > INT32_MAX) {
        return refuse("axis " + std::to_string(axis) + " of " + kInputNames[input],
                      side < 1 ? 1 : INT32_MAX, side);
      }
      if (!take(input, axes[axis], static_cast<int32_t>(side))) return false;
    }
    return true;
  }

  // Raises every size to that of an input's shape: the maximum shapes of an optimisation profile
  // need not agree with one another.
  void grow(int32_t input, const Shape& shape) {
    const char* axes = kInputAxes[input];
    for (int32_t axis = 0; axis < shape.rank && axes[axis] != '\0'; ++axis) {
      if (axes[axis] < 'a' || shape.side[axis] > INT32_MAX) continue;
      int32_t& known = size(axes[axis]);
      if (shape.side[axis] > known) known = static_cast<int32_t>(shape.side[axis]);
    }
  }

  // Call after all inputs. Returns false, with a `reason()`, where no kernel takes such a call.
  bool complete() {
    for (int32_t rows : {position_rows_, reference_rows_}) {
      if (rows > 1 && first_of_['q' - 'a'] == nullptr) call_.q = rows;
    }
    call_.position_queries = position_rows_;
    call_.reference_queries = reference_rows_;
    const char* reason = invalid_reason(call_);
    if (reason != nullptr) reason_ = reason;
    return reason == nullptr;
  }

  // The call with sizes and attributes; the caller fills in the pointers.
  MmfsCall& call() { return call_; }
  const std::string& reason() const { return reason_; }

 private:
  int32_t& size(char letter) {
    switch (letter) {
      case 'b': return call_.b;
      case 'q': return call_.q;
      case 'm': return call_.m;
      case 'h': return call_.h;
      case 'l': return call_.l;
      case 'p': return call_.p;
      case 'd': return call_.d;
      case 'n': return call_.n;
      case 's': return call_.s;
      default: return call_.r;
    }
  }

  bool take(int32_t input, char letter, int32_t side) {
    const char* name = kInputNames[input];
    if (letter == '*') {
      (input == kImagePosition ? position_rows_ : reference_rows_) = side;
      return true;
    }
    if (letter == '2') {
      return side == 2 || refuse(std::string(name) + " must end in (x, y)", 2, side);
    }
    int32_t& known = size(letter);
    const char*& first = first_of_[letter - 'a'];
    const bool given = letter == 'l' || letter == 's';  // the attributes determine these
    if ((given || first != nullptr) && known != side) {
      const char* other = first != nullptr ? first : "the attributes";
      return refuse(std::string(name) + " and " + other + " differ in " + letter, known, side);
    }
    if (first == nullptr) first = name;
    known = side;
    return true;
  }

  bool refuse(const std::string& what, int64_t expected, int64_t got) {
    reason_ = what + "; expected " + std::to_string(expected) + ", got " + std::to_string(got);
    return false;
  }

  MmfsCall call_{};
  int32_t position_rows_ = 1, reference_rows_ = 1;
  const char* first_of_[26] = {};  // the input that gave a letter its size
  std::string reason_;
};

}  // namespace mmi
