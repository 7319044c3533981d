// The parameter of the kernels of mmi::WeightOnlyMatMul. Compiles under nvcc, NVRTC and any C++17
// compiler; mmi_plugins/gemv/launch_plan.py packs the same bytes in Python.
#pragma once

#include "kernel_parameters.h"

namespace mmi {

// The parameter of every kernel, passed by value. A tile has kGemvOutputs output channels, a step
// kGemvStep input channels. The order of `weight` and of scales per block: gemv.cuh.
struct GemvParameters {
  const void* input;   // [rows, in]
  const void* weight;  // [tiles, steps, loads, 32 lanes, 16 bytes]
  const void* scales;  // [out]; with blocks [tiles, steps, 8, kGemvStep / block, 2]
  void* output;        // [rows, out]
  int rows, in, out;
  int steps;           // in / kGemvStep, rounded up
};

}  // namespace mmi
