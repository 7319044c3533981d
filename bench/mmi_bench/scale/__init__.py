"""Growth of time and memory with images, tokens, rows and denoising steps."""
