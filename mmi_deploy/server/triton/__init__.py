"""Model of Triton Inference Server: the batch engine behind its Python backend."""
