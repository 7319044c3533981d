// Launch of a call on a GPU: all that the TensorRT plugin and ONNX Runtime's CUDA kernel use.
// Includes none of CUDA's headers; mmfs.cu defines it.
#pragma once

#include <cstddef>

#include "mmfs.h"

struct CUstream_st;  // cudaStream_t is CUstream_st*

namespace mmi {

// Bytes of device memory that `launch` takes as `workspace`, aligned to 16 bytes; may be 0. They
// never grow when a size shrinks, so a profile's largest shapes give the bound.
size_t workspace_bytes(const MmfsCall& call);

// Loads every kernel onto the current device, if there is one. Otherwise CUDA loads a kernel at its
// first launch, which is not allowed while a CUDA graph is captured.
void preload();

// Launches the call on `stream` (of the current device) and returns at once; allocates nothing and
// may be captured in a CUDA graph. Returns nullptr, or the reason in one line of static text: an
// invalid call, a pointer that is missing or not aligned (to 16 bytes; reference to 8, indices to
// 4), sizes beyond what addresses can hold, or CUDA's own error.
const char* launch(const MmfsCall& call, void* workspace, CUstream_st* stream);

}  // namespace mmi
