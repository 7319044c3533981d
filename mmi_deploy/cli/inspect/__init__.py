"""`mmi inspect`: parts, cost, memory, GPUs, targets and sensitivity of a model."""
