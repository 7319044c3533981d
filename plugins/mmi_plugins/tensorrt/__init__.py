"""Our operators as TensorRT plugins: compiled, ahead of time, or for building only."""
