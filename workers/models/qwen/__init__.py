"""The Qwen-VL models: text decoder with three-axis positions, image encoder."""
