"""Interleaved documents: parts, files, pictures, tokens, and the HTML page."""
