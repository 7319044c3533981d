"""Interleaved documents: parts, files, pictures, tokenizer, and the HTML page."""
