// SIMD vectors for the CPU kernel, and conversion of 16-bit types from and to vectors of floats.
//
// Written in the vector extensions of GCC and Clang, with vectors as wide as a register of the
// instruction set: wider ones compile too, but spill into loads and stores. Compiled once for each
// instruction set, in the namespace that MMI_VARIANT names.
#pragma once

#include <cstdint>
#include <cstring>

namespace mmi {
namespace MMI_VARIANT {
namespace {

#define MMI_INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int kWidth = 16;  // floats of a register
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

// N numbers of each kind.
template <int N>
struct Vector {
  typedef float Floats __attribute__((vector_size(4 * N)));
  typedef double Doubles __attribute__((vector_size(8 * N)));
  typedef int32_t Ints __attribute__((vector_size(4 * N)));
  typedef uint32_t Bits __attribute__((vector_size(4 * N)));
  typedef uint16_t Shorts __attribute__((vector_size(2 * N)));
};

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

// The same bits as another vector type.
template <typename To, typename From>
MMI_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  return load<To>(&from);
}

// x where the mask is all ones, 0 where it is 0.
template <typename Mask, typename V>
MMI_INLINE V only(Mask mask, V x) {
  return bits_as<V>(mask & bits_as<Mask>(x));
}

template <typename V>
MMI_INLINE V magnitude(V x) {
  using Ints = decltype(x > x);
  return only(Ints{} + 0x7fffffff, x);
}

// ---- 16-bit types --------------------------------------------------------------------------

// N numbers of type T as floats.
template <int N>
MMI_INLINE auto widened(const float* from) {
  return load<typename Vector<N>::Floats>(from);
}

template <int N>
MMI_INLINE auto widened(const BFloat16* from) {
  using V = Vector<N>;
  const auto bits =
      __builtin_convertvector(load<typename V::Shorts>(from), typename V::Bits);
  return bits_as<typename V::Floats>(bits << 16);
}

template <int N>
MMI_INLINE auto widened(const Float16* from) {
  using V = Vector<N>;
  using Bits = typename V::Bits;
  const Bits bits = __builtin_convertvector(load<typename V::Shorts>(from), Bits);
  const Bits sign = (bits & 0x8000u) << 16;
  // A product changes the exponent's bias from 15 to 127, which is right for subnormals too.
  const auto scaled = bits_as<typename V::Floats>((bits & 0x7fffu) << 13) * 0x1p112f;
  // Infinity and NaN keep an exponent of all ones.
  const Bits special = (bits & 0x7c00u) == 0x7c00u ? Bits{} + 0x7f800000u : Bits{};
  return bits_as<typename V::Floats>(sign | bits_as<Bits>(scaled) | special);
}

// `count` numbers as floats; neither reads nor writes beyond them.
template <typename T>
MMI_INLINE void widen(const T* from, int count, float* to) {
  int i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    asm("" : "+r"(i));  // keeps the loop from becoming a call of memcpy, slow for so few
    store(to + i, widened<kWidth>(from + i));
  }
  for (; i + 4 <= count; i += 4) store(to + i, widened<4>(from + i));
  for (; i < count; ++i) {
    T four[4] = {from[i]};
    to[i] = widened<4>(four)[0];
  }
}

MMI_INLINE void narrow(float x, float* to) { *to = x; }

MMI_INLINE void narrow(float x, BFloat16* to) {
  const uint32_t bits = bits_as<uint32_t>(x);
  to->bits = x == x ? static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16) : 0x7fc0;
}

MMI_INLINE void narrow(float x, Float16* to) {
  uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  uint32_t half;
  if (bits > 0x7f800000u) {
    half = 0x7e00u;  // NaN
  } else if (bits >= 0x477ff000u) {
    half = 0x7c00u;  // rounds beyond 65504
  } else if (bits < 0x38800000u) {
    // Subnormal: adding 0.5 aligns the last bit with that of fp16, and rounds to nearest even.
    half = bits_as<uint32_t>(bits_as<float>(bits) + 0.5f) - 0x3f000000u;
  } else {
    half = (bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  }
  to->bits = static_cast<uint16_t>(sign | half);
}

// ---- arithmetic ----------------------------------------------------------------------------

using Floats = Vector<kWidth>::Floats;

MMI_INLINE Floats all(float x) { return Floats{} + x; }

// x + y and its rounding error: together exact.
struct Exact {
  Floats sum, rest;
};

MMI_INLINE Exact exact_sum(Floats x, Floats y) {
  const Floats sum = x + y, part = sum - x;
  return {sum, (x - (sum - part)) + (y - part)};
}

// e^x for x up to about 0; 0 below -87, NaN for NaN.
MMI_INLINE Floats exp_of(Floats x) {
  using Ints = Vector<kWidth>::Ints;
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
  return only(alive, y * bits_as<Floats>(power));
}

// Reduction over the lanes by `join`, in halves.
template <int N, typename Join>
MMI_INLINE float folded(typename Vector<N>::Floats x, Join join) {
  if constexpr (N == 4) {
    const float left = join(x[0], x[1]), right = join(x[2], x[3]);
    return join(left, right);
  } else {
    typename Vector<N / 2>::Floats half[2];
    std::memcpy(half, &x, sizeof(x));
    return folded<N / 2>(join(half[0], half[1]), join);
  }
}

MMI_INLINE float greatest(Floats x) {
  return folded<kWidth>(x, [](auto a, auto b) { return a > b ? a : b; });
}

MMI_INLINE float total_of(Floats x) {
  return folded<kWidth>(x, [](auto a, auto b) { return a + b; });
}

}  // namespace
}  // namespace MMI_VARIANT
}  // namespace mmi
