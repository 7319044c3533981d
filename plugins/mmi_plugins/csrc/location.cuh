// Weights and places: the exponential, and locations to more than fp32.
#pragma once

#include "device.cuh"

namespace mmi {

// e^x to about 1 ulp for x <= 0; 0 below -87, NaN for NaN.
MMI_DEVICE float power(float x, float rest = 0.0f) {
  x = x < -120.0f ? -120.0f : x + rest;
  const float scaled = __fmul_rn(x, 1.44269502f);
  const float lost = fmaf(x, 1.92596303e-8f, fmaf(x, 1.44269502f, -scaled));
  const float y = exp2_fast(scaled);
  return fmaf(y, lost * 0.693147181f, y);
}

// A number as an unevaluated sum of two floats. Plain fp32 locations are 1e-6 pixels off on a map
// 32 wide, which alone costs more than the 1e-6 that fp32 outputs are allowed.
struct Twofold { float whole, rest; };

MMI_DEVICE Twofold two_sum(float a, float b) {  // exact (Knuth)
  const float sum = a + b;
  const float part = sum - a;
  return {sum, (a - (sum - part)) + (b - part)};
}

// reference + (offset + table) / base_grid
MMI_DEVICE Twofold moved_by(float reference, float offset, float table, const Problem& call) {
  const Twofold moved = two_sum(offset, table);
  const float step = __fmul_rn(moved.whole, call.inverse_grid);
  const float lost = fmaf(moved.whole, call.inverse_grid, -step) +
                     fmaf(moved.rest, call.inverse_grid, moved.whole * call.inverse_grid_rest);
  const Twofold location = two_sum(reference, step);
  return {location.whole, location.rest + lost};
}

// The two cells that a location lies between along one side of a map, and their shares: 0 outside.
struct Between {
  float near_share, far_share;
  int near_cell, far_cell;  // within the map always
  bool touches;             // either cell is inside
};

MMI_DEVICE Between between(Twofold location, int side) {
  const float length = static_cast<float>(side);
  const float product = __fmul_rn(location.whole, length);
  const float lost = fmaf(location.whole, length, -product) + location.rest * length;
  const float pixel = product - 0.5f;
  const float low = floorf(pixel);
  // Not refloored: bilinear weights just below 0 or above 1 are right to first order.
  const float part = (pixel - low) + lost;
  // Clamped as float, where NaN turns into -2: any location makes a valid integer.
  const int cell = static_cast<int>(fminf(fmaxf(low, -2.0f), length));
  const bool near_inside = static_cast<unsigned>(cell) < static_cast<unsigned>(side);
  const bool far_inside = static_cast<unsigned>(cell + 1) < static_cast<unsigned>(side);
  return {near_inside ? 1.0f - part : 0.0f, far_inside ? part : 0.0f,
          min(max(cell, 0), side - 1), min(max(cell + 1, 0), side - 1),
          near_inside || far_inside};
}

}  // namespace mmi
