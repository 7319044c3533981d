"""The MMFS operator in PyTorch: definition, registered op, Triton kernels."""
