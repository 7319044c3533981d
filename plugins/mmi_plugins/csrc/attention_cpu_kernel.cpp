// The CPU kernel for one instruction set, which the compiler's flags and MMI_VARIANT name.
//
// Written in the vector extensions of GCC and Clang: 16 floats at a time, which become whatever
// registers the instruction set has. The points of one image fit into one vector, so locations and
// corner shares are computed for all points at once; then every corner adds a row of channels.
//
// Few queries read the pool where it lies. Many first copy a head's slice of an image to one place,
// as floats: in the pool its rows lie h*d numbers apart, often a power of two, so that they fall on
// few lines of the caches and each on a page of its own.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <type_traits>

#include "attention.h"

namespace mmi {
namespace MMI_VARIANT {
namespace {

#define MMI_INLINE inline __attribute__((always_inline))

constexpr int kLanes = 16;
constexpr int kMostEntries = kMostLevels * kMostPoints;  // logits of one image: levels x points
constexpr float kNever = -3.0e38f;                       // a logit below every real one

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef float HalfFloats __attribute__((vector_size(32)));
typedef uint32_t HalfBits __attribute__((vector_size(32)));
typedef uint16_t HalfShorts __attribute__((vector_size(16)));

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <typename V, typename P>
MMI_INLINE V load(const P* from) {
  V vector;
  std::memcpy(&vector, from, sizeof(V));
  return vector;
}

template <typename V>
MMI_INLINE void store(void* to, V vector) {
  std::memcpy(to, &vector, sizeof(V));
}

MMI_INLINE Floats all(float x) { return Floats{} + x; }

MMI_INLINE Floats bits_of(Ints x) {
  Floats y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}

MMI_INLINE Ints bits_of(Floats x) {
  Ints y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}

// x + y, and what rounding took from it: together exact.
struct Exact {
  Floats sum, rest;
};

MMI_INLINE Exact exact_sum(Floats x, Floats y) {
  const Floats sum = x + y, part = sum - x;
  return {sum, (x - (sum - part)) + (y - part)};
}

MMI_INLINE Floats only(Ints mask, Floats x) { return bits_of(mask & bits_of(x)); }

// ---- numbers of 16 bits --------------------------------------------------------------------

MMI_INLINE HalfFloats widened(HalfBits bits) {
  HalfFloats y;
  std::memcpy(&y, &bits, sizeof(y));
  return y;
}

// 8 channels as floats.
MMI_INLINE HalfFloats channels(const float* from) { return load<HalfFloats>(from); }

MMI_INLINE HalfFloats channels(const BFloat16* from) {
  const HalfBits bits = __builtin_convertvector(load<HalfShorts>(from), HalfBits);
  return widened(bits << 16);
}

MMI_INLINE HalfFloats channels(const Float16* from) {
  const HalfBits bits = __builtin_convertvector(load<HalfShorts>(from), HalfBits);
  const HalfBits sign = (bits & 0x8000u) << 16;
  // The exponent's bias grows from 15 to 127 by a product, which is right for subnormals as well.
  const HalfFloats scaled = widened((bits & 0x7fffu) << 13) * 0x1p112f;
  HalfBits magnitude;
  std::memcpy(&magnitude, &scaled, sizeof(magnitude));
  // Infinity and not-a-number keep their exponent of ones.
  const HalfBits special = (bits & 0x7c00u) == 0x7c00u ? HalfBits{} + 0x7f800000u : HalfBits{};
  return widened(sign | magnitude | special);
}

MMI_INLINE float scalar(float x) { return x; }

MMI_INLINE float scalar(BFloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float y;
  std::memcpy(&y, &bits, sizeof(y));
  return y;
}

MMI_INLINE float scalar(Float16 x) {
  Float16 eight[8] = {x};
  return channels(eight)[0];
}

MMI_INLINE void narrow(float x, float* to) { *to = x; }

MMI_INLINE void narrow(float x, BFloat16* to) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  to->bits = x == x ? static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16) : 0x7fc0;
}

MMI_INLINE void narrow(float x, Float16* to) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  uint32_t half;
  if (bits > 0x7f800000u) {
    half = 0x7e00u;  // not a number
  } else if (bits >= 0x477ff000u) {
    half = 0x7c00u;  // rounds beyond 65504
  } else if (bits < 0x38800000u) {
    // Subnormal: an addition puts the last bit where half has it, and rounds to nearest even.
    float y;
    std::memcpy(&y, &bits, sizeof(y));
    y += 0.5f;
    std::memcpy(&half, &y, sizeof(half));
    half -= 0x3f000000u;
  } else {
    half = (bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  }
  to->bits = static_cast<uint16_t>(sign | half);
}

// ---- the softmax ---------------------------------------------------------------------------

// e^x for x up to about 0; 0 below -87. What is not a number stays so.
MMI_INLINE Floats exp_of(Floats x) {
  const Ints alive = ~(x <= -87.0f);
  x = only(alive, x);
  const Floats shifted = x * 1.44269504088896341f + 12582912.0f;  // rounds to a whole number
  const Floats n = shifted - 12582912.0f;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats y = all(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  const Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
  return only(alive, y * bits_of(power));
}

typedef float QuarterFloats __attribute__((vector_size(16)));

// The lanes folded onto four by `join`, then the four.
template <typename Join>
MMI_INLINE float folded(Floats x, Join join) {
  HalfFloats eight[2];
  std::memcpy(eight, &x, sizeof(x));
  const HalfFloats half = join(eight[0], eight[1]);
  QuarterFloats four[2];
  std::memcpy(four, &half, sizeof(half));
  const QuarterFloats quarter = join(four[0], four[1]);
  const float left = join(quarter[0], quarter[1]), right = join(quarter[2], quarter[3]);
  return join(left, right);
}

MMI_INLINE float greatest(Floats x) {
  return folded(x, [](auto a, auto b) { return a > b ? a : b; });
}

// ---- corners -------------------------------------------------------------------------------

struct Corners {
  int32_t cell[4][kLanes];  // of the level
  float share[4][kLanes];   // weight times bilinear share; 0 outside the map
};

// Where points lie on a map, along one axis: the cell before each, and how far past its centre.
//
// A float's last bit is too coarse a part of a cell on a large map, so whole cells and parts are
// added apart: those of the reference, and those of the offsets, which count cells of the base grid.
MMI_INLINE void place(float reference, const Exact& offset, float per_cell, int32_t side,
                      Ints* cell, Floats* part) {
  // Far outside, and not a number, become just outside: the integers stay small.
  constexpr float kFar = 1 << 22;
  double start = double{reference} * side - 0.5;
  start = start > -kFar ? start : -kFar;
  start = start < kFar ? start : kFar;
  const double whole = std::floor(start);
  const float scale = static_cast<float>(side) * per_cell;
  Floats moved = offset.sum * scale;
  moved = moved > -kFar ? moved : all(-kFar);
  moved = moved < kFar ? moved : all(kFar);
  Ints cells = __builtin_convertvector(moved, Ints);
  const Floats past = moved - __builtin_convertvector(cells, Floats);
  Floats parts = past + offset.rest * scale + static_cast<float>(start - whole);
  const Ints back = parts < 0.0f, on = parts >= 1.0f;  // -1 where so
  cells += back - on + static_cast<int32_t>(whole);
  parts += only(back, all(1.0f)) - only(on, all(1.0f));
  cells = cells > -2 ? cells : Ints{} - 2;
  *cell = cells < side ? cells : Ints{} + side;
  *part = parts;
}

// The corners around points on a map of height x width cells.
MMI_INLINE void find_corners(float reference_x, const Exact& offset_x, float reference_y,
                             const Exact& offset_y, float per_cell, Floats weight, int32_t height,
                             int32_t width, Corners* corners) {
  Ints x0, y0;
  Floats right, down;
  place(reference_x, offset_x, per_cell, width, &x0, &right);
  place(reference_y, offset_y, per_cell, height, &y0, &down);
  const Ints x1 = x0 + 1, y1 = y0 + 1;
  const Ints in_x0 = (x0 >= 0) & (x0 < width), in_x1 = (x1 >= 0) & (x1 < width);
  const Ints in_y0 = (y0 >= 0) & (y0 < height), in_y1 = (y1 >= 0) & (y1 < height);
  const Floats upper = weight * (1.0f - down), lower = weight * down;
  const Floats left = 1.0f - right;
  const Ints row0 = y0 * width, row1 = y1 * width;
  const Ints inside[4] = {in_y0 & in_x0, in_y0 & in_x1, in_y1 & in_x0, in_y1 & in_x1};
  const Floats share[4] = {upper * left, upper * right, lower * left, lower * right};
  const Ints cell[4] = {row0 + x0, row0 + x1, row1 + x0, row1 + x1};
  for (int c = 0; c < 4; ++c) {
    store(corners->cell[c], inside[c] & cell[c]);
    store(corners->share[c], only(inside[c], share[c]));
  }
}

// ---- sums of channels ----------------------------------------------------------------------

MMI_INLINE void write(const float* from, int count, float by, float* to) {
  for (int i = 0; i < count; ++i) to[i] = from[i] * by;
}

template <typename T>
MMI_INLINE void write(const float* from, int count, float by, T* to) {
  for (int i = 0; i < count; ++i) narrow(from[i] * by, to + i);
}

// The sum of one head of float channels: kUnits vectors of type V, in registers.
template <typename V, int kUnits>
struct Registers {
  using Element = float;
  static constexpr int kWidth = sizeof(V) / sizeof(float);
  V sum[kUnits];

  MMI_INLINE void start(const float* null_value, int32_t) {
    for (int i = 0; i < kUnits; ++i) sum[i] = null_value ? load<V>(null_value + i * kWidth) : V{};
  }
  MMI_INLINE void scale(float by, int32_t) {
    for (int i = 0; i < kUnits; ++i) sum[i] *= by;
  }
  MMI_INLINE void add(const float* const row[4], const float share[4], int32_t) {
    for (int i = 0; i < kUnits; ++i) {
      const int at = i * kWidth;
      sum[i] += share[0] * load<V>(row[0] + at) + share[1] * load<V>(row[1] + at);
      sum[i] += share[2] * load<V>(row[2] + at) + share[3] * load<V>(row[3] + at);
    }
  }
};

// The same for any type and head size, 8 channels at a time.
template <typename T>
struct Memory {
  using Element = T;
  HalfFloats sum[kMostChannels / 8];

  MMI_INLINE void start(const float* null_value, int32_t d) {
    for (int i = 0; i < d / 8; ++i) {
      sum[i] = null_value ? load<HalfFloats>(null_value + 8 * i) : HalfFloats{};
    }
  }
  MMI_INLINE void scale(float by, int32_t d) {
    for (int i = 0; i < d / 8; ++i) sum[i] *= by;
  }
  MMI_INLINE void add(const T* const row[4], const float share[4], int32_t d) {
    for (int i = 0; i < d / 8; ++i) {
      sum[i] += share[0] * channels(row[0] + 8 * i) + share[1] * channels(row[1] + 8 * i);
      sum[i] += share[2] * channels(row[2] + 8 * i) + share[3] * channels(row[3] + 8 * i);
    }
  }
};

// ---- one query and one image ---------------------------------------------------------------

// `count` numbers as floats, 8 at a time; never reads beyond them.
template <typename T>
MMI_INLINE void widen(const T* from, int count, float* to) {
  int i = 0;
  for (; i + 8 <= count; i += 8) store(to + i, channels(from + i));
  for (; i < count; ++i) to[i] = scalar(from[i]);
}

// Pairs (x, y) of points as one vector of each.
MMI_INLINE void unpair(const float* pairs, Floats* x, Floats* y) {
  float xs[kLanes], ys[kLanes];
  for (int p = 0; p < kLanes; ++p) {
    xs[p] = pairs[2 * p];
    ys[p] = pairs[2 * p + 1];
  }
  *x = load<Floats>(xs);
  *y = load<Floats>(ys);
}

// What all queries of one head share.
struct Head {
  const Attention& call;
  int32_t b, h;
  int entries, vectors;  // logits of one image, and how many vectors they take
  int64_t stride;        // numbers from one cell of the pool to the next

  Head(const Attention& given, int32_t batch, int32_t head)
      : call(given),
        b(batch),
        h(head),
        entries(given.l * given.p),
        vectors((entries + kLanes - 1) / kLanes),
        stride(int64_t{given.h} * given.d) {}

  int64_t row(int32_t q) const { return (int64_t{b} * call.q + q) * call.h + h; }

  // Relative position of image m as query q sees it; 0 where it does not.
  int32_t position(int32_t q, int32_t m) const {
    const int32_t seen = call.position_queries == 1 ? 0 : q;
    const int32_t r =
        call.image_position[(int64_t{b} * call.position_queries + seen) * call.m + m];
    const int32_t slot = call.image_slot[int64_t{b} * call.m + m];
    return r > 0 && r < call.r && slot >= 0 && slot < call.n ? r : 0;
  }

  // The head's channels of the first cell of image m, which must be visible.
  template <typename T>
  const T* image(int32_t m) const {
    const int64_t slot = call.image_slot[int64_t{b} * call.m + m];
    return static_cast<const T*>(call.value) + slot * call.s * stride + int64_t{h} * call.d;
  }
};

// A query's own numbers, and the running softmax of what it has seen.
template <typename Sum>
struct Query {
  Floats logits[kMostEntries / kLanes];  // kNever beyond the last
  Floats x, y;                           // offsets
  float reference_x, reference_y;
  Sum sum;
  float most, total;

  template <typename T>
  MMI_INLINE void start(const Head& head, int32_t q) {
    const Attention& call = head.call;
    const int64_t row = head.row(q);
    float given[kMostEntries], pairs[2 * kLanes] = {};
    for (int i = 0; i < head.vectors; ++i) store(given + i * kLanes, all(kNever));
    widen(static_cast<const T*>(call.logits) + row * head.entries, head.entries, given);
    widen(static_cast<const T*>(call.offsets) + row * call.p * 2, 2 * call.p, pairs);
    unpair(pairs, &x, &y);
    for (int i = 0; i < head.vectors; ++i) logits[i] = load<Floats>(given + i * kLanes);
    const float* point = call.reference + (call.reference_queries == 1 ? 0 : int64_t{q} * 2);
    reference_x = point[0];
    reference_y = point[1];
    const float* null_value = call.null_value + int64_t{head.h} * call.d;
    sum.start(call.null_slot ? null_value : nullptr, call.d);
    most = call.null_slot ? 0.0f : kNever;
    total = call.null_slot ? 1.0f : 0.0f;
  }

  // Adds an image at relative position r; `image` holds its cells `stride` numbers apart.
  MMI_INLINE void look(const Head& head, int32_t r, const typename Sum::Element* image,
                       int64_t stride) {
    const Attention& call = head.call;
    const int64_t table = int64_t{r} * call.h + head.h;
    float weight[kMostEntries + kLanes] = {}, moved[2 * kLanes] = {};
    widen(call.logit_table + table * head.entries, head.entries, weight);
    widen(call.offset_table + table * call.p * 2, 2 * call.p, moved);

    Exact score[kMostEntries / kLanes];
    Floats highest = all(kNever);
    for (int i = 0; i < head.vectors; ++i) {
      score[i] = exact_sum(logits[i], load<Floats>(weight + i * kLanes));
      highest = score[i].sum > highest ? score[i].sum : highest;
    }
    const float new_most = greatest(highest);
    if (new_most > most) {
      const float fade = exp_of(all(most - new_most))[0];
      sum.scale(fade, call.d);
      total *= fade;
      most = new_most;
    }
    Floats powers = {};
    for (int i = 0; i < head.vectors; ++i) {
      const Floats power = exp_of((score[i].sum - most) + score[i].rest);
      powers += power;
      store(weight + i * kLanes, power);
    }
    total += folded(powers, [](auto a, auto b) { return a + b; });

    const float per_cell = 1.0f / call.base_grid;
    Floats moved_x, moved_y;
    unpair(moved, &moved_x, &moved_y);
    const Exact offset_x = exact_sum(x, moved_x), offset_y = exact_sum(y, moved_y);
    for (int l = 0; l < call.l; ++l) {
      Corners corners;
      find_corners(reference_x, offset_x, reference_y, offset_y, per_cell,
                   load<Floats>(weight + l * call.p), call.level_height[l], call.level_width[l],
                   &corners);
      for (int p = 0; p < call.p; ++p) {
        float share[4];
        const typename Sum::Element* corner[4];
        for (int c = 0; c < 4; ++c) {
          share[c] = corners.share[c][p];
          corner[c] = image + corners.cell[c][p] * stride;
        }
        sum.add(corner, share, call.d);
      }
      image += int64_t{call.level_height[l]} * call.level_width[l] * stride;
    }
  }

  template <typename T>
  MMI_INLINE void finish(const Head& head, int32_t q) const {
    float channels[kMostChannels];
    std::memcpy(channels, &sum, sizeof(sum));
    write(channels, head.call.d, total > 0.0f ? 1.0f / total : 0.0f,
          static_cast<T*>(head.call.output) + head.row(q) * head.call.d);
  }
};

// ---- many queries --------------------------------------------------------------------------

// Memory of a thread, kept from call to call.
struct Scratch {
  std::unique_ptr<float, decltype(&std::free)> memory{nullptr, &std::free};
  size_t held = 0;

  // At least so many bytes on a cache line, or nullptr.
  void* take(size_t bytes) {
    if (bytes > held) {
      memory.reset();
      void* fresh = nullptr;
      held = posix_memalign(&fresh, 64, bytes) == 0 ? bytes : 0;
      memory.reset(static_cast<float*>(held ? fresh : nullptr));
    }
    return memory.get();
  }
};

// Queries read where the pool lies.
template <typename Sum, typename T>
void look_in_pool(const Head& head, int32_t first, int32_t last) {
  for (int32_t q = first; q < last; ++q) {
    Query<Sum> query;
    query.template start<T>(head, q);
    for (int32_t m = 0; m < head.call.m; ++m) {
      const int32_t r = head.position(q, m);
      if (r != 0) query.look(head, r, head.image<T>(m), head.stride);
    }
    query.template finish<T>(head, q);
  }
}

// Queries read copies, image by image. False where there is no memory for that.
template <typename Sum, typename T>
bool look_in_copies(const Head& head, int32_t first, int32_t last) {
  const Attention& call = head.call;
  const int32_t count = last - first;
  const size_t state = sizeof(Query<Sum>) * count;
  static thread_local Scratch scratch;
  void* memory = scratch.take(state + sizeof(float) * call.s * call.d);
  if (memory == nullptr) return false;
  auto* queries = static_cast<Query<Sum>*>(memory);
  auto* copy = reinterpret_cast<float*>(static_cast<char*>(memory) + state);

  for (int32_t i = 0; i < count; ++i) queries[i].template start<T>(head, first + i);
  for (int32_t m = 0; m < call.m; ++m) {
    bool copied = false;
    for (int32_t i = 0; i < count; ++i) {
      const int32_t r = head.position(first + i, m);
      if (r == 0) continue;
      if (!copied) {
        const T* image = head.image<T>(m);
        for (int32_t cell = 0; cell < call.s; ++cell) {
          widen(image + cell * head.stride, call.d, copy + int64_t{cell} * call.d);
        }
        copied = true;
      }
      queries[i].look(head, r, copy, call.d);
    }
  }
  for (int32_t i = 0; i < count; ++i) queries[i].template finish<T>(head, first + i);
  return true;
}

// Whether so many queries read more rows than a copy takes.
bool worth_copying(const Attention& call, int32_t count) {
  return int64_t{count} * call.l * call.p * 4 > 4 * int64_t{call.s};
}

template <typename Sum, typename T>
void look_with(const Head& head, int32_t first, int32_t last) {
  if (worth_copying(head.call, last - first) && look_in_copies<Sum, T>(head, first, last)) return;
  if constexpr (std::is_same_v<T, float>) {
    look_in_pool<Sum, T>(head, first, last);
  } else {
    look_in_pool<Memory<T>, T>(head, first, last);
  }
}

template <typename T>
void look(const Head& head, int32_t first, int32_t last) {
#ifdef __AVX2__  // otherwise too few registers to be worth the compiler's time
  switch (head.call.d) {
    case 32: return look_with<Registers<Floats, 2>, T>(head, first, last);
    case 64: return look_with<Registers<Floats, 4>, T>(head, first, last);
    case 80: return look_with<Registers<Floats, 5>, T>(head, first, last);
    case 128: return look_with<Registers<Floats, 8>, T>(head, first, last);
  }
#endif
  look_with<Memory<float>, T>(head, first, last);
}

}  // namespace

// Queries first to last (exclusive) of head h of row b.
void rows(const Attention& call, int32_t b, int32_t h, int32_t first, int32_t last) {
  const Head head(call, b, h);
  switch (call.type) {
    case DataType::kFloat32: return look<float>(head, first, last);
    case DataType::kFloat16: return look<Float16>(head, first, last);
    case DataType::kBFloat16: return look<BFloat16>(head, first, last);
  }
}

}  // namespace MMI_VARIANT
}  // namespace mmi
