"""Operating system: files, output and temporary folders, memory, progress."""
