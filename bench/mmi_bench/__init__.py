"""Benchmarks: the runtime against PyTorch in the published order of work, kernels, GPU check."""
