"""timm, the reference of an image encoder, where it is installed."""

from __future__ import annotations

import importlib.util
import sys
from unittest.mock import MagicMock

# What timm imports at its top, for data sets and for layers that no encoder here has.
_TORCHVISION = (
    "torchvision", "torchvision.datasets", "torchvision.models", "torchvision.models.feature_extraction",
    "torchvision.ops", "torchvision.ops.misc", "torchvision.transforms", "torchvision.transforms.functional",
)  # fmt: skip


def import_timm() -> bool:
    """Import it; False where it is not installed.

    Without torchvision, whose library needs the very PyTorch that it was built with, and which transformers would use
    in place of Pillow wherever it finds it.
    """
    if importlib.util.find_spec("timm") is None:
        return False
    if "timm" not in sys.modules and importlib.util.find_spec("torchvision") is None:
        sys.modules.update({name: MagicMock(name=name) for name in _TORCHVISION})
        try:
            importlib.import_module("timm")
        finally:
            for name in _TORCHVISION:
                del sys.modules[name]
    return True
