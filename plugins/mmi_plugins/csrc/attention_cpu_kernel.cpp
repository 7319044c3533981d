// The CPU kernel for one instruction set, which the compiler's flags and MMI_VARIANT name.
//
// Written in the vector extensions of GCC and Clang: 16 floats at a time, which become whatever
// registers the instruction set has. The points of one image fit into one vector, so locations and
// corner shares are computed for all points at once; then every corner adds a row of channels.
#include <cstring>

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

// e^x for x <= 0; 0 below -87. What is not a number stays so.
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

MMI_INLINE float greatest(Floats x) {
  float most = x[0];
  for (int i = 1; i < kLanes; ++i) most = x[i] > most ? x[i] : most;
  return most;
}

MMI_INLINE float sum(Floats x) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += x[i];
  return total;
}

// ---- corners -------------------------------------------------------------------------------

struct Corners {
  int32_t cell[4][kLanes];  // of the level
  float share[4][kLanes];   // weight times bilinear share; 0 outside the map
};

// The corners around points at (x, y) in [0, 1] on a map of height x width cells.
MMI_INLINE void find_corners(Floats x, Floats y, Floats weight, int32_t height, int32_t width,
                             Corners* corners) {
  const float w = static_cast<float>(width), h = static_cast<float>(height);
  Floats px = x * w - 0.5f, py = y * h - 0.5f;
  // Far outside, and not a number, become just outside: the integers stay small.
  px = px > -2.0f ? px : all(-2.0f);
  py = py > -2.0f ? py : all(-2.0f);
  px = px < w ? px : all(w);
  py = py < h ? py : all(h);
  Ints x0 = __builtin_convertvector(px, Ints), y0 = __builtin_convertvector(py, Ints);
  x0 += __builtin_convertvector(x0, Floats) > px;  // truncation was up: one less
  y0 += __builtin_convertvector(y0, Floats) > py;
  const Floats right = px - __builtin_convertvector(x0, Floats);
  const Floats down = py - __builtin_convertvector(y0, Floats);
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

// The accumulator of one head of float channels in registers: kUnits vectors of type V.
template <typename V, int kUnits>
struct Registers {
  using T = float;
  V sum[kUnits];

  MMI_INLINE void start(const float* null_value, int32_t) {
    for (int i = 0; i < kUnits; ++i) {
      sum[i] = null_value ? load<V>(null_value + i * (sizeof(V) / 4)) : V{};
    }
  }
  MMI_INLINE void scale(float by, int32_t) {
    for (int i = 0; i < kUnits; ++i) sum[i] *= by;
  }
  MMI_INLINE void add(const float* const row[4], const float share[4], int32_t) {
    for (int i = 0; i < kUnits; ++i) {
      const int at = i * static_cast<int>(sizeof(V) / 4);
      sum[i] += share[0] * load<V>(row[0] + at) + share[1] * load<V>(row[1] + at);
      sum[i] += share[2] * load<V>(row[2] + at) + share[3] * load<V>(row[3] + at);
    }
  }
  MMI_INLINE void write(float* to, float by, int32_t) {
    for (int i = 0; i < kUnits; ++i) store(to + i * (sizeof(V) / 4), sum[i] * by);
  }
};

// The same for any type and head size, 8 channels at a time.
template <typename Element>
struct Memory {
  using T = Element;
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
  MMI_INLINE void write(T* to, float by, int32_t d) {
    for (int i = 0; i < d; ++i) narrow(sum[i / 8][i % 8] * by, to + i);
  }
};

// ---- rows ----------------------------------------------------------------------------------

// What a query says before any image is looked at, in vectors.
template <typename T>
struct Query {
  // Less their greatest, `zero`, so that adding a table's small numbers loses nothing of them when
  // all are far from 0; kNever beyond the last.
  float logits[kMostEntries];
  float zero = kNever;
  float x[kLanes] = {}, y[kLanes] = {};
  float reference_x, reference_y;

  MMI_INLINE Query(const Attention& call, int64_t row, int32_t q) {
    const int entries = call.l * call.p;
    const T* logit = static_cast<const T*>(call.logits) + row * entries;
    const T* offset = static_cast<const T*>(call.offsets) + row * call.p * 2;
    for (int i = 0; i < entries; ++i) {
      logits[i] = scalar(logit[i]);
      zero = logits[i] > zero ? logits[i] : zero;
    }
    for (int i = 0; i < entries; ++i) logits[i] -= zero;
    for (int i = entries; i < kMostEntries; ++i) logits[i] = kNever;
    for (int p = 0; p < call.p; ++p) {
      x[p] = scalar(offset[2 * p]);
      y[p] = scalar(offset[2 * p + 1]);
    }
    const float* point = call.reference + (call.reference_queries == 1 ? 0 : int64_t{q} * 2);
    reference_x = point[0];
    reference_y = point[1];
  }
};

// One (b, q, h): a running softmax over the visible images, so that any number will do.
template <typename Sum>
MMI_INLINE void row(const Attention& call, int32_t b, int32_t q, int32_t h) {
  using T = typename Sum::T;
  const int64_t row = (int64_t{b} * call.q + q) * call.h + h;
  const int entries = call.l * call.p;
  const int vectors = (entries + kLanes - 1) / kLanes;
  const float per_cell = 1.0f / call.base_grid;
  const Query<T> query(call, row, q);
  const int32_t* position =
      call.image_position +
      (int64_t{b} * call.position_queries + (call.position_queries == 1 ? 0 : q)) * call.m;
  const int32_t* slots = call.image_slot + int64_t{b} * call.m;
  const int64_t stride = int64_t{call.h} * call.d;

  Sum accumulator;
  accumulator.start(call.null_slot ? call.null_value + int64_t{h} * call.d : nullptr, call.d);
  float most = call.null_slot ? -query.zero : kNever, total = call.null_slot ? 1.0f : 0.0f;
  for (int32_t m = 0; m < call.m; ++m) {
    const int32_t r = position[m], slot = slots[m];
    if (r <= 0 || r >= call.r || slot < 0 || slot >= call.n) continue;

    const int64_t table = int64_t{r} * call.h + h;
    float weight[kMostEntries + kLanes] = {}, moved[2 * kLanes] = {};
    std::memcpy(weight, call.logit_table + table * entries, sizeof(float) * entries);
    std::memcpy(moved, call.offset_table + table * call.p * 2, sizeof(float) * 2 * call.p);

    Floats score[kMostEntries / kLanes], highest = all(kNever);
    for (int i = 0; i < vectors; ++i) {
      score[i] = load<Floats>(query.logits + i * kLanes) + load<Floats>(weight + i * kLanes);
      highest = score[i] > highest ? score[i] : highest;
    }
    const float new_most = greatest(highest);
    if (new_most > most) {
      const float fade = exp_of(all(most - new_most))[0];
      accumulator.scale(fade, call.d);
      total *= fade;
      most = new_most;
    }
    Floats powers = {};
    for (int i = 0; i < vectors; ++i) {
      score[i] = exp_of(score[i] - most);
      powers += score[i];
      store(weight + i * kLanes, score[i]);
    }
    total += sum(powers);

    Floats x, y;
    for (int p = 0; p < kLanes; ++p) {
      x[p] = moved[2 * p];
      y[p] = moved[2 * p + 1];
    }
    x = query.reference_x + (x + load<Floats>(query.x)) * per_cell;
    y = query.reference_y + (y + load<Floats>(query.y)) * per_cell;
    const T* image =
        static_cast<const T*>(call.value) + slot * call.s * stride + int64_t{h} * call.d;
    for (int l = 0; l < call.l; ++l) {
      Corners corners;
      find_corners(x, y, load<Floats>(weight + l * call.p), call.level_height[l],
                   call.level_width[l], &corners);
      for (int p = 0; p < call.p; ++p) {
        float share[4];
        const T* corner[4];
        for (int c = 0; c < 4; ++c) {
          share[c] = corners.share[c][p];
          corner[c] = image + corners.cell[c][p] * stride;
        }
        accumulator.add(corner, share, call.d);
      }
      image += int64_t{call.level_height[l]} * call.level_width[l] * stride;
    }
  }
  accumulator.write(static_cast<T*>(call.output) + row * call.d,
                    total > 0.0f ? 1.0f / total : 0.0f, call.d);
}

template <typename Sum>
void all_rows(const Attention& call, int32_t b, int32_t h, int32_t first, int32_t last) {
  for (int32_t q = first; q < last; ++q) row<Sum>(call, b, q, h);
}

}  // namespace

void rows(const Attention& call, int32_t b, int32_t h, int32_t first, int32_t last) {
  if (call.type == DataType::kFloat16) return all_rows<Memory<Float16>>(call, b, h, first, last);
  if (call.type == DataType::kBFloat16) return all_rows<Memory<BFloat16>>(call, b, h, first, last);
  switch (call.d) {
    case 16: return all_rows<Registers<Floats, 1>>(call, b, h, first, last);
    case 32: return all_rows<Registers<Floats, 2>>(call, b, h, first, last);
    case 40: return all_rows<Registers<HalfFloats, 5>>(call, b, h, first, last);
    case 64: return all_rows<Registers<Floats, 4>>(call, b, h, first, last);
    case 80: return all_rows<Registers<Floats, 5>>(call, b, h, first, last);
    case 128: return all_rows<Registers<Floats, 8>>(call, b, h, first, last);
    default: return all_rows<Memory<float>>(call, b, h, first, last);
  }
}

}  // namespace MMI_VARIANT
}  // namespace mmi
