"""`make gpu-check`: build, run, compare and measure on an NVIDIA GPU."""
