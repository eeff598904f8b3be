"""LoRA adapters: several variants of one model in one batch. See docs/adapters.md."""

from workers.adapters.install import install
from workers.adapters.rows import Adapters

__all__ = ["Adapters", "install"]
