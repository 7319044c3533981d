"""Commands of `mmi` that compare with PyTorch: bench, inspect flops-saved."""
