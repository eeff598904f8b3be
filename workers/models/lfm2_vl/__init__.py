"""LFM2-VL: mlx-lm's text decoder with attention of ours, and an image encoder of our own."""
