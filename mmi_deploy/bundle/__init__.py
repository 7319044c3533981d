"""Bundle: graphs, weights, manifest with checksums and receipts, build reports."""
