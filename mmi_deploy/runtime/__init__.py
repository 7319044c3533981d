"""The autoregressive text-and-image loop over the engines of a bundle."""
