"""Model definitions: our own families, and the adapter for the other text architectures of mlx-lm."""
