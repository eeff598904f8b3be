"""Checkpoints in other forms: quantised, dequantised, in another type, as MLX's loaders read them."""

from workers.convert.checkpoint import Converted, convert
from workers.convert.mtp import split_mtp
from workers.convert.quantization import Quantization

__all__ = ["Converted", "Quantization", "convert", "split_mtp"]
