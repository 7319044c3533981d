"""Training and evaluation of MM-Interleaved in plain PyTorch."""
