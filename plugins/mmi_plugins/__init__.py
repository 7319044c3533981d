"""MMFS kernels: definition of the operator, sources, compilation, runtimes, conformance tests."""
