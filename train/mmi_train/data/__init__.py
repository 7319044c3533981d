"""Training data: token rows, packing, pixels."""
