// The exponential, and sampling locations in more than fp32 precision.
#pragma once

#include "device.cuh"

namespace mmi {

// e^(x + rest) to about 1 ulp for x <= 0; 0 below -87, NaN for NaN.
MMI_DEVICE float exp_of(float x, float rest = 0.0f) {
  x = x < -120.0f ? -120.0f : x + rest;
  const float scaled = __fmul_rn(x, 1.44269502f);
  const float lost = fmaf(x, 1.92596303e-8f, fmaf(x, 1.44269502f, -scaled));
  const float y = exp2_fast(scaled);
  return fmaf(y, lost * 0.693147181f, y);
}

// A double-float: the unevaluated sum of two floats. Plain fp32 locations are 1e-6 cells off on a
// level 32 wide, which alone exceeds the tolerance of fp32 outputs, 1e-6.
struct DoubleFloat { float high, low; };

MMI_DEVICE DoubleFloat two_sum(float a, float b) {  // a + b without rounding (Knuth)
  const float sum = a + b;
  const float part = sum - a;
  return {sum, (a - (sum - part)) + (b - part)};
}

// reference + (offset + table) / base_grid
MMI_DEVICE DoubleFloat moved_by(float reference, float offset, float table,
                                const KernelParameters& call) {
  const DoubleFloat moved = two_sum(offset, table);
  const float step = __fmul_rn(moved.high, call.inverse_grid);
  const float lost = fmaf(moved.high, call.inverse_grid, -step) +
                     fmaf(moved.low, call.inverse_grid, moved.high * call.inverse_grid_rest);
  const DoubleFloat location = two_sum(reference, step);
  return {location.high, location.low + lost};
}

// Linear interpolation along one axis of a level: the two neighbouring cells and their shares, 0
// for a cell outside the level.
struct AxisSample {
  float near_share, far_share;
  int near_cell, far_cell;  // clamped to the level
  bool touches;             // one of the cells is inside
};

MMI_DEVICE AxisSample sample_axis(DoubleFloat location, int side) {
  const float length = static_cast<float>(side);
  const float product = __fmul_rn(location.high, length);
  const float lost = fmaf(location.high, length, -product) + location.low * length;
  const float pixel = product - 0.5f;
  const float low = floorf(pixel);
  // `lost` may carry it just below 0 or above 1: such bilinear weights are right to first order.
  const float part = (pixel - low) + lost;
  // Clamped as a float, which turns NaN into -2: any location gives a valid integer.
  const int cell = static_cast<int>(fminf(fmaxf(low, -2.0f), length));
  const bool near_inside = static_cast<unsigned>(cell) < static_cast<unsigned>(side);
  const bool far_inside = static_cast<unsigned>(cell + 1) < static_cast<unsigned>(side);
  return {near_inside ? 1.0f - part : 0.0f, far_inside ? part : 0.0f,
          min(max(cell, 0), side - 1), min(max(cell + 1, 0), side - 1),
          near_inside || far_inside};
}

}  // namespace mmi
