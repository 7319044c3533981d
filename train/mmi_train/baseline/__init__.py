"""Baseline of the benchmarks: generation and MMFS as the published code computes them."""
