"""MiniCPM-V 4.6: an image encoder that merges patches on its way, beside mlx-lm's Qwen3.5."""
