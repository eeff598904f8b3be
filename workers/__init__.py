"""The processes that compute: target and drafter. The only code that imports MLX."""
