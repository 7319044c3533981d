// Splits a call into tasks and dispatches each to the kernel for this processor.
//
// The kernel (mmfs_cpu_kernel.cpp) is compiled once for each instruction set. Dispatch happens at
// run time, so that one library serves different machines.
#include "mmfs_cpu.h"

#include <cstdlib>
#include <cstring>

namespace mmi {

using Rows = void (*)(const MmfsCall&, int32_t b, int32_t h, int32_t first, int32_t last);

namespace base {
void rows(const MmfsCall&, int32_t b, int32_t h, int32_t first, int32_t last);
}
#ifdef MMI_X86
namespace avx2 {
void rows(const MmfsCall&, int32_t b, int32_t h, int32_t first, int32_t last);
}
namespace avx512 {
void rows(const MmfsCall&, int32_t b, int32_t h, int32_t first, int32_t last);
}
#endif

namespace {

// Queries of one task. Each task copies the images that it reads, which favours many queries; yet
// there should be at least kTasks tasks, so that many cores have work.
constexpr int32_t kMaxTaskQueries = 2048, kMinTaskQueries = 128;
constexpr int64_t kTasks = 16;
constexpr int64_t kSmallCall = 1 << 19;  // multiply-adds; about 20 microseconds of one core

// The kernel for the widest instruction set of this processor; MMI_CPU=base or avx2 limits it.
Rows choose() {
#ifdef MMI_X86
  const char* asked = std::getenv("MMI_CPU");
  const bool base_only = asked != nullptr && std::strcmp(asked, "base") == 0;
  const bool no_avx512 = asked != nullptr && std::strcmp(asked, "avx2") == 0;
  __builtin_cpu_init();
  if (!base_only && !no_avx512 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw")) {
    return avx512::rows;
  }
  if (!base_only && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return avx2::rows;
  }
#endif
  return base::rows;
}

int32_t queries_per_task(const MmfsCall& call) {
  const int64_t even = (int64_t{call.b} * call.h * call.q + kTasks - 1) / kTasks;
  if (even < kMinTaskQueries) return kMinTaskQueries;
  return even < kMaxTaskQueries ? static_cast<int32_t>(even) : kMaxTaskQueries;
}

int32_t blocks(const MmfsCall& call) { return (call.q - 1) / queries_per_task(call) + 1; }

}  // namespace

int64_t cpu_tasks(const MmfsCall& call) { return int64_t{call.b} * call.h * blocks(call); }

bool cpu_is_small(const MmfsCall& call) {
  const int64_t rows = int64_t{call.b} * call.q * call.h;
  return rows * call.m * call.l * call.p * call.d * 4 < kSmallCall;
}

void cpu_run(const MmfsCall& call, int64_t task) {
  static const Rows rows = choose();
  // Consecutive tasks are of one head: they read the same slice of the images.
  const int32_t block = static_cast<int32_t>(task % blocks(call));
  const int64_t bh = task / blocks(call);
  const int32_t some = queries_per_task(call), first = block * some;
  const int32_t last = call.q - first < some ? call.q : first + some;
  rows(call, static_cast<int32_t>(bh / call.h), static_cast<int32_t>(bh % call.h), first, last);
}

}  // namespace mmi
