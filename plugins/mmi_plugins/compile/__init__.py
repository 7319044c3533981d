"""Compilation of the CUDA and C++ sources in `csrc`: compilers, NVRTC, launch plans, checksums."""
