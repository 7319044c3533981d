"""Parity of exported graphs with the PyTorch model; its results become receipts."""
