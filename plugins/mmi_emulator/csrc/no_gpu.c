// CUDA's runtime for a machine without a GPU: enough of it that ONNX Runtime's CUDA provider loads,
// places the nodes of a graph and enqueues runs. Device memory is memory of the host; kernels do
// nothing. cuda_provider.py adds the functions that are not here, which return success.
//
// Calls that a test wants to know of are written to the file MMI_NO_GPU_LOG, one a line.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { kSuccess = 0, kOutOfMemory = 2, kInvalidDevice = 101, kNotFound = 500 };

static uintptr_t next_handle = 0x7000;

static void say(const char* what, size_t number) {
  const char* path = getenv("MMI_NO_GPU_LOG");
  FILE* file = path ? fopen(path, "a") : NULL;
  if (file == NULL) return;
  fprintf(file, "%s %zu\n", what, number);
  fclose(file);
}

static int handle(void** made) {
  *made = (void*)(next_handle += 16);
  return kSuccess;
}

static int architecture(void) {
  const char* given = getenv("MMI_NO_GPU_SM");
  return given ? atoi(given) : 89;
}

int cudaGetDeviceCount(int* count) { return *count = 1, kSuccess; }
int cudaGetDevice(int* device) { return *device = 0, kSuccess; }
int cudaSetDevice(int device) { return device == 0 ? kSuccess : kInvalidDevice; }
int cudaDriverGetVersion(int* version) { return *version = 13020, kSuccess; }
int cudaRuntimeGetVersion(int* version) { return *version = 13000, kSuccess; }

// The first fields of CUDA 13's cudaDeviceProp, by their offsets.
int cudaGetDeviceProperties(char* properties, int device) {
  memset(properties, 0, 640);
  strcpy(properties, "no GPU");
  *(size_t*)(properties + 288) = (size_t)1 << 36;  // totalGlobalMem
  *(size_t*)(properties + 296) = 49152;            // sharedMemPerBlock
  *(int*)(properties + 304) = 65536;               // regsPerBlock
  *(int*)(properties + 308) = 32;                  // warpSize
  *(size_t*)(properties + 312) = (size_t)1 << 30;  // memPitch
  *(int*)(properties + 320) = 1024;                // maxThreadsPerBlock
  const int sizes[6] = {1024, 1024, 64, 2147483647, 65535, 65535};
  memcpy(properties + 324, sizes, sizeof sizes);  // maxThreadsDim, maxGridSize
  *(size_t*)(properties + 352) = 65536;           // totalConstMem
  *(int*)(properties + 360) = architecture() / 10;
  *(int*)(properties + 364) = architecture() % 10;
  *(int*)(properties + 384) = 58;  // multiProcessorCount
  return kSuccess;
}

int cudaDeviceGetAttribute(int* value, int attribute, int device) {
  switch (attribute) {
    case 1: *value = 1024; break;     // threads of a block
    case 10: *value = 32; break;      // of a warp
    case 16: *value = 58; break;      // multiprocessors
    case 75: *value = architecture() / 10; break;
    case 76: *value = architecture() % 10; break;
    case 81: *value = 102400; break;  // shared memory of a multiprocessor
    case 97: *value = 101376; break;  // and of a block, at most
    default: *value = 1;
  }
  return kSuccess;
}

static int allocate(void** made, size_t size) {
  return posix_memalign(made, 256, size ? size : 1) ? kOutOfMemory : kSuccess;
}

int cudaMalloc(void** made, size_t size) { return say("malloc", size), allocate(made, size); }
int cudaMallocHost(void** made, size_t size) { return allocate(made, size); }
int cudaHostAlloc(void** made, size_t size, unsigned flags) { return allocate(made, size); }
int cudaMallocAsync(void** made, size_t size, void* stream) {
  return say("malloc_async", size), allocate(made, size);
}
int cudaMallocFromPoolAsync(void** made, size_t size, void* pool, void* stream) {
  return say("malloc_async", size), allocate(made, size);
}
int cudaFree(void* memory) { return free(memory), kSuccess; }
int cudaFreeHost(void* memory) { return free(memory), kSuccess; }
int cudaFreeAsync(void* memory, void* stream) { return free(memory), kSuccess; }
int cudaMemcpy(void* to, const void* from, size_t size, int kind) {
  return memcpy(to, from, size), kSuccess;
}
int cudaMemcpyAsync(void* to, const void* from, size_t size, int kind, void* stream) {
  say(kind == 1 ? "to_device" : kind == 2 ? "to_host" : "on_device", size);
  return memmove(to, from, size), kSuccess;
}
int cudaMemset(void* memory, int value, size_t size) {
  return memset(memory, value, size), kSuccess;
}
int cudaMemsetAsync(void* memory, int value, size_t size, void* stream) {
  return memset(memory, value, size), kSuccess;
}
int cudaMemGetInfo(size_t* unused, size_t* total) {
  return *unused = (size_t)1 << 35, *total = (size_t)1 << 36, kSuccess;
}
int cudaPointerGetAttributes(void* attributes, const void* pointer) {
  memset(attributes, 0, 32);
  *(int*)attributes = 2;  // device memory
  return kSuccess;
}

int cudaStreamCreate(void** stream) { return handle(stream); }
int cudaStreamCreateWithFlags(void** stream, unsigned flags) { return handle(stream); }
int cudaStreamSynchronize(void* stream) { return say("wait", (uintptr_t)stream), kSuccess; }
int cudaStreamIsCapturing(void* stream, int* status) { return *status = 0, kSuccess; }
int cudaStreamBeginCapture(void* stream, int mode) {
  return say("begin_capture", (uintptr_t)stream), kSuccess;
}
int cudaStreamEndCapture(void* stream, void** graph) {
  return say("end_capture", (uintptr_t)stream), handle(graph);
}
int cudaGraphInstantiate(void** made, void* graph, unsigned long long flags) {
  return handle(made);
}
int cudaGraphLaunch(void* graph, void* stream) {
  return say("launch", (uintptr_t)stream), kSuccess;
}
int cudaEventCreate(void** event) { return handle(event); }
int cudaEventCreateWithFlags(void** event, unsigned flags) { return handle(event); }
int cudaMemPoolCreate(void** pool, const void* properties) { return handle(pool); }

int cudaLaunchKernel(const void* kernel, long long grid, int z, long long block, int depth,
                     void** arguments, size_t shared, void* stream) {
  return kSuccess;
}
int cudaFuncGetAttributes(void* attributes, const void* kernel) {
  memset(attributes, 0, 144);
  ((int*)attributes)[6] = 1024;  // maxThreadsPerBlock
  return kSuccess;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* kernel,
                                                           int threads, size_t shared,
                                                           unsigned flags) {
  return *blocks = 2, kSuccess;
}
int cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version,
                                     unsigned long long flags, int* status) {
  *function = NULL;
  if (status != NULL) *status = 1;
  return kNotFound;
}
const char* cudaGetErrorName(int error) { return "error"; }
const char* cudaGetErrorString(int error) { return "error of the machine without a GPU"; }

void** __cudaRegisterFatBinary(void* binary) {
  static void* registered;
  return &registered;
}
int __cudaPopCallConfiguration(void* grid, void* block, size_t* shared, void** stream) {
  memset(grid, 0, 12);
  memset(block, 0, 12);
  *shared = 0;
  *stream = NULL;
  return kSuccess;
}
