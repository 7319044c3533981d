// How a call is put on a GPU: the TensorRT plugin and ONNX Runtime's CUDA kernel call this and
// nothing else. Needs none of CUDA's headers; mmfs.cu defines it.
#pragma once

#include <cstddef>

#include "mmfs.h"

struct CUstream_st;  // cudaStream_t is CUstream_st*

namespace mmi {

// Bytes of device memory that `launch` wants as `workspace`, 16-byte aligned; 0 is possible. No
// call of the same or smaller sizes wants more, so the largest shapes of a profile give the bound.
size_t workspace_bytes(const Attention& call);

// Loads every kernel onto the current device, where there is one. CUDA loads a kernel at its first
// launch otherwise, which must not fall into the capture of a graph.
void preload();

// Puts the call on `stream` (of the current device) and returns at once; allocates nothing and may
// be captured in a CUDA graph. Returns nullptr, or one line that says why not: a refusal, a pointer
// that is missing or not aligned (to 16 bytes; reference to 8, indices to 4), sizes beyond what
// addresses can hold, or CUDA's own error. The text is static.
const char* launch(const Attention& call, void* workspace, CUstream_st* stream);

}  // namespace mmi
