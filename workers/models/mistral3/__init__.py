"""Mistral 3, Ministral 3 and Pixtral: a text decoder of ours, Pixtral's image encoder, and what joins them."""
