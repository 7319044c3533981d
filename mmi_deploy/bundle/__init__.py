"""The deployed folder: graphs, weights, manifest with checksums and receipts, build reports."""
