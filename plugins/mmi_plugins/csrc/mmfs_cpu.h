// The operator on a CPU: independent tasks, which the caller distributes over its threads.
#pragma once

#include "mmfs.h"

namespace mmi {

// Number of tasks of `call`: blocks of queries of one head, which may run in any order, at once.
int64_t cpu_tasks(const MmfsCall& call);

// Whether waking other threads for a call this small would cost more than it saves.
bool cpu_is_small(const MmfsCall& call);

// Runs task `task`. `invalid_reason(call)` must be nullptr.
void cpu_run(const MmfsCall& call, int64_t task);

}  // namespace mmi
