"""MMFS as our own kernels: one operator, and everything that runs, builds and proves it."""
