"""Weights from files: Hugging Face folders (plain or quantised) and GGUF."""

from workers.load.loader import LoadedModel, load

__all__ = ["LoadedModel", "load"]
