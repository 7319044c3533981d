// The CUDA kernels as a CPU library for ctypes; shim_device.h replaces the device.
#include "shim_device.h"

#include <csetjmp>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include <ucontext.h>

#include "gemv_plan.h"
#include "gemv_rows.cuh"
#include "mmfs.cuh"
#include "plan.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

mmi::shim::Index threadIdx, blockIdx;

MMI_ROWS_AND_SPLITS(MMI_ROWS_KERNEL)
MMI_ROWS_AND_SPLITS(MMI_SPLIT_KERNEL)
MMI_MERGES(MMI_MERGE_KERNEL)
MMI_GEMVS(MMI_GEMV_KERNEL)
MMI_GEMVS(MMI_GEMV_ROWS_KERNEL)

namespace mmi::shim {
namespace {

constexpr size_t kStack = 64 * 1024;
constexpr size_t kMaxExchangeBytes = 48;  // of one lane

// One thread of the block.
struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t begin;
  jmp_buf at;
  bool started = false, waits = false, left = false;
  SyncPoint kind = SyncPoint::kWarp;
  // Double buffering: when a fiber sends again, all others have read its previous value.
  alignas(16) unsigned char sent[2][kMaxExchangeBytes];
  unsigned turn = 0;
};

std::vector<Fiber> fibers;
std::map<int, std::unique_ptr<char[]>> arrays;  // shared memory by line
jmp_buf scheduler;
unsigned current;
int skipped_line;  // line of a barrier that does not synchronise
std::function<void()> body;  // the kernel with its parameter
std::string failure;

#if defined(__SANITIZE_ADDRESS__)
const void* main_stack;
size_t main_size;
void leaves(const void* bottom, size_t size) {
  __sanitizer_start_switch_fiber(nullptr, bottom, size);
}
void arrives() { __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr); }
void first_arrives() { __sanitizer_finish_switch_fiber(nullptr, &main_stack, &main_size); }
void leaves_to_scheduler() { leaves(main_stack, main_size); }
#else
void leaves(const void*, size_t) {}
void arrives() {}
void first_arrives() {}
void leaves_to_scheduler() {}
#endif

void to_scheduler() {
  leaves_to_scheduler();
  _longjmp(scheduler, 1);
}

void enter() {
  first_arrives();
  body();
  fibers[current].left = true;
  to_scheduler();
}

// Runs a fiber up to its next synchronisation point, or to its end.
void resume(unsigned thread) {
  current = thread;
  threadIdx = {thread, 0, 0};
  Fiber& fiber = fibers[thread];
  fiber.waits = false;
  if (_setjmp(scheduler) == 0) {
    leaves(fiber.stack.get(), kStack);
    if (fiber.started) _longjmp(fiber.at, 1);
    fiber.started = true;
    setcontext(&fiber.begin);
  }
  arrives();
}

void prepare(Fiber& fiber) {
  fiber.started = fiber.waits = fiber.left = false;
  fiber.turn = 0;
  getcontext(&fiber.begin);
  fiber.begin.uc_stack.ss_sp = fiber.stack.get();
  fiber.begin.uc_stack.ss_size = kStack;
  fiber.begin.uc_link = nullptr;
  makecontext(&fiber.begin, enter, 0);
}

// Releases the threads [first, last) if all of them wait at points of one kind.
bool release(unsigned first, unsigned last, bool block) {
  unsigned waiting = 0, left = 0;
  for (unsigned i = first; i < last; ++i) {
    waiting += fibers[i].waits;
    left += fibers[i].left;
  }
  if (waiting == 0) return false;
  for (unsigned i = first; i < last; ++i) {
    if (fibers[i].waits && (fibers[i].kind == SyncPoint::kBlock) != block) return false;
  }
  if (left > 0) {
    failure = "a thread has left the kernel where others wait for it";
    return false;
  }
  if (waiting < last - first) return false;
  for (unsigned i = first; i < last; ++i) {
    if (fibers[i].kind != fibers[first].kind) {
      failure = "threads of a warp wait at different points";
      return false;
    }
  }
  for (unsigned i = first; i < last; ++i) fibers[i].waits = false;
  return true;
}

void run_block(unsigned threads, bool backwards) {
  arrays.clear();
  for (unsigned i = 0; i < threads; ++i) prepare(fibers[i]);
  for (;;) {
    bool ran = false;
    for (unsigned i = 0; i < threads; ++i) {
      const unsigned thread = backwards ? threads - 1 - i : i;
      if (fibers[thread].waits || fibers[thread].left) continue;
      resume(thread);
      ran = true;
      if (!failure.empty()) return;
    }
    bool released = release(0, threads, true);
    for (unsigned warp = 0; warp < threads && !released; warp += kLanes) {
      released = release(warp, warp + kLanes, false);
    }
    if (!failure.empty()) return;
    if (ran || released) continue;
    for (unsigned i = 0; i < threads; ++i) {
      if (!fibers[i].left) failure = "threads wait for others that never come";
    }
    return;
  }
}

template <class T>
void widen(unsigned word, float* pair) {
  pair[0] = to_float(T{static_cast<unsigned short>(word)});
  pair[1] = to_float(T{static_cast<unsigned short>(word >> 16)});
}

struct Fragments {
  float a[4][2], b[2][2];  // registers, each a pair
};

// mma.m16n8k16 with fragments laid out as PTX says: c += a b, the sums in fp32.
template <class T>
void multiply_fragments(float (&c)[4], uint4 a, unsigned b0, unsigned b1) {
  Fragments mine;
  const unsigned words[6] = {a.x, a.y, a.z, a.w, b0, b1};
  for (int i = 0; i < 4; ++i) widen<T>(words[i], mine.a[i]);
  for (int i = 0; i < 2; ++i) widen<T>(words[4 + i], mine.b[i]);
  exchange(SyncPoint::kMultiply, &mine, sizeof mine);
  const int group = lane() / 4, place = lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = group + 8 * (i / 2), column = 2 * place + i % 2;
    float sum = 0;
    for (int k = 0; k < 16; ++k) {
      const auto* of_a = static_cast<const Fragments*>(received(4 * (row % 8) + k % 8 / 2));
      const auto* of_b = static_cast<const Fragments*>(received(4 * column + k % 8 / 2));
      sum += of_a->a[row / 8 + 2 * (k / 8)][k % 2] * of_b->b[k / 8][k % 2];
    }
    c[i] += sum;
  }
}

}  // namespace

int lane() { return static_cast<int>(current % kLanes); }

void* shared(size_t bytes, int line) {
  std::unique_ptr<char[]>& array = arrays[line];
  if (!array) {
    array.reset(new char[bytes]);
    std::memset(array.get(), 0xff, bytes);
  }
  return array.get();
}

void synchronise(SyncPoint kind) {
  Fiber& fiber = fibers[current];
  fiber.waits = true;
  fiber.kind = kind;
  if (_setjmp(fiber.at) == 0) to_scheduler();
  arrives();
}

void barrier(SyncPoint kind, int line) {
  if (line != skipped_line) synchronise(kind);
}

void exchange(SyncPoint kind, const void* value, size_t bytes) {
  Fiber& fiber = fibers[current];
  std::memcpy(fiber.sent[++fiber.turn % 2], value, bytes);
  synchronise(kind);
}

const void* received(int lane) {
  const Fiber& mine = fibers[current];
  return fibers[current / kLanes * kLanes + lane].sent[mine.turn % 2];
}

}  // namespace mmi::shim

namespace mmi {

void multiply(Half, float (&c)[4], uint4 a, unsigned b0, unsigned b1) {
  shim::multiply_fragments<Half>(c, a, b0, b1);
}
void multiply(BFloat16, float (&c)[4], uint4 a, unsigned b0, unsigned b1) {
  shim::multiply_fragments<BFloat16>(c, a, b0, b1);
}

namespace {

// fp32 holds the exact product and, for the few bits that dequantisation adds, the exact sum.
template <class T>
unsigned fma_of_pairs(unsigned a, unsigned b, unsigned c) {
  float result[2];
  for (int i = 0; i < 2; ++i) {
    const auto wide = [i](unsigned word) {
      return to_float(T{static_cast<unsigned short>(word >> 16 * i)});
    };
    result[i] = wide(a) * wide(b) + wide(c);
  }
  return pack(T{}, result[0], result[1]);
}

}  // namespace

unsigned fma_pairs(Half, unsigned a, unsigned b, unsigned c) { return fma_of_pairs<Half>(a, b, c); }
unsigned fma_pairs(BFloat16, unsigned a, unsigned b, unsigned c) {
  return fma_of_pairs<BFloat16>(a, b, c);
}

}  // namespace mmi

namespace {

// A kernel as a function of the bytes of its parameter.
using Kernel = std::function<void(const void*)>;
template <class Parameters>
Kernel kernel_of(void (*kernel)(Parameters)) {
  return [kernel](const void* bytes) { kernel(*static_cast<const Parameters*>(bytes)); };
}

}  // namespace

// Runs the given blocks (x, y, z each) of a kernel, without the barrier on line `without` of
// its file (0: with all barriers). Returns nullptr, or an error message.
extern "C" const char* mmi_shim_launch(const char* kernel, const void* parameters,
                                       const unsigned* blocks, long count, unsigned threads,
                                       bool backwards, int without) {
  using namespace mmi::shim;
#define MMI_NAME_ROWS(NAME, T, WIDE) {#NAME "_rows", kernel_of(NAME##_rows)},
#define MMI_NAME_SPLIT(NAME, T, WIDE) {#NAME "_split", kernel_of(NAME##_split)},
#define MMI_NAME_MERGE(NAME, T, WIDE) {#NAME "_merge", kernel_of(NAME##_merge)},
#define MMI_NAME_GEMV(NAME, T, FORMAT) \
  {#NAME, kernel_of(NAME)}, {#NAME "_rows", kernel_of(NAME##_rows)},
  static const std::map<std::string, Kernel> kernels = {
      MMI_ROWS_AND_SPLITS(MMI_NAME_ROWS) MMI_ROWS_AND_SPLITS(MMI_NAME_SPLIT)
          MMI_MERGES(MMI_NAME_MERGE) MMI_GEMVS(MMI_NAME_GEMV)};
  const auto found = kernels.find(kernel);
  if (found == kernels.end()) return "no such kernel";
  if (threads % mmi::kLanes != 0) return "a block is made of whole warps";
  body = [&] { found->second(parameters); };
  skipped_line = without;
  failure.clear();
  if (fibers.size() < threads) fibers = std::vector<Fiber>(threads);
  for (long i = 0; i < count && failure.empty(); ++i) {
    blockIdx = {blocks[3 * i], blocks[3 * i + 1], blocks[3 * i + 2]};
    run_block(threads, backwards);
  }
  arrays.clear();
  return failure.empty() ? nullptr : failure.c_str();
}

// The launch plan of mmfs.cu for a call: kernel parameters, blocks that share a row, bytes of
// workspace, and the three grids. Returns nullptr, or the reason why the call cannot run.
extern "C" const char* mmi_shim_plan(const mmi::MmfsCall* call, void* workspace,
                                     mmi::KernelParameters* parameters, int* parts, size_t* bytes,
                                     mmi::Grid* grids) {
  if (const char* reason = mmi::unsupported_reason(*call)) return reason;
  *parts = mmi::parts_of(*call);
  *bytes = mmi::plan_workspace_bytes(*call);
  *parameters = mmi::kernel_parameters(*call, *parts, workspace);
  grids[0] = mmi::rows_grid(*call);
  grids[1] = mmi::split_grid(*call, *parts);
  grids[2] = mmi::merge_grid(*call);
  return nullptr;
}

// The launch plan of gemv.cu for a call: kernel parameter and grid. Returns nullptr, or the reason
// why the call cannot run.
extern "C" const char* mmi_shim_gemv_plan(const mmi::GemvCall* call,
                                          mmi::GemvParameters* parameters, mmi::Grid* grid) {
  if (const char* reason = mmi::unsupported_reason(*call)) return reason;
  *parameters = mmi::gemv_parameters(*call);
  *grid = mmi::gemv_grid(*call);
  return nullptr;
}
