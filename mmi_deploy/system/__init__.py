"""Files, temporary folders, memory and progress: what depends on the operating system alone."""
