"""Runtime: autoregressive generation of text and images with the engines of a bundle."""
