"""Training data: documents, token rows, packing, pixels; `synthetic` makes documents."""
