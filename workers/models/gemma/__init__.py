"""Gemma 3 and Gemma 4: one text decoder, image and audio towers, and what joins them."""
