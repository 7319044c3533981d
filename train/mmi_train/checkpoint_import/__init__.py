"""Import of the published checkpoint, and of LLaMA, CLIP and Stable Diffusion weights."""
