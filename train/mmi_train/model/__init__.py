"""MM-Interleaved in plain PyTorch; modules have the paper's names. Begin at `mm_interleaved.py`."""
