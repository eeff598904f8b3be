"""Idefics3 and SmolVLM: a Llama decoder with an image encoder whose positions follow the patch grid."""
