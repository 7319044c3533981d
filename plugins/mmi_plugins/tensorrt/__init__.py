"""The MMFS operator as a TensorRT plugin: compiled, ahead of time, or for building only."""
