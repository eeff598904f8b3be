"""The HTTP process: APIs, templates, tokenizer, streaming. It never imports MLX."""
