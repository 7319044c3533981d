"""Commands of `mmi` that need PyTorch: train, evaluate, convert, init."""
