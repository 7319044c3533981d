// The operator on a CPU: independent tasks, for whoever owns the threads.
#pragma once

#include "mmfs.h"

namespace mmi {

// How many tasks `call` splits into: blocks of queries of one head. They may run in any order, at
// the same time.
int64_t cpu_tasks(const Attention& call);

// Whether a call is so small that waking other threads would cost more than it saves.
bool cpu_is_small(const Attention& call);

// Runs task `task`. `refusal(call)` must be nullptr.
void cpu_run(const Attention& call, int64_t task);

}  // namespace mmi
