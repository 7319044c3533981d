"""The published way of computing, in PyTorch: the baseline of benchmarks."""
