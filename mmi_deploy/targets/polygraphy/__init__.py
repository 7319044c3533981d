"""Polygraphy, NVIDIA's tool to compare backends: inputs in each bundle, saved outputs, a runner,
and the search for the first wrong tensor."""
