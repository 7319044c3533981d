"""Weight files: lazy tensors, safetensors, pickles, model folders."""
