"""MM-Interleaved in plain PyTorch; modules carry the paper's names. Start at `mm_interleaved.py`."""
