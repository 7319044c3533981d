"""Measurements of training: pictures a second, memory of adapters, documents that come back."""
