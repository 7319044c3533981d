"""Training data: documents, token rows, packing, pixels, batches; `synthetic` makes documents."""
