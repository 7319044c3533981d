"""Comparison of exported graphs with the PyTorch model: receipts."""
