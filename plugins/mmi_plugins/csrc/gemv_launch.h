// Launch of mmi::WeightOnlyMatMul on a GPU: all that the TensorRT plugin and ONNX Runtime's CUDA
// kernel use. Includes none of CUDA's headers; gemv.cu defines it.
#pragma once

#include "gemv.h"

struct CUstream_st;  // cudaStream_t is CUstream_st*

namespace mmi {

// Loads every kernel onto the current device, as `preload` of launch.h does.
void preload_gemv();

// Launches the call on `stream` (of the current device) and returns at once; allocates nothing and
// may be captured in a CUDA graph. Returns nullptr, or the reason in one line of static text.
const char* launch_gemv(const GemvCall& call, CUstream_st* stream);

}  // namespace mmi
