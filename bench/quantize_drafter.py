"""Make a drafter checkpoint small: `python -m bench.quantize_drafter FOLDER OUT [--bits 8] [--group-size 64]`.

Every weight matrix becomes MLX's affine integers with a scale and a bias for each group, in the checkpoint's own names,
and config.json says so under `quantization`; norms, tables and what else is not a layer's matrix stay as they are. The
workers dequantise on load, so this saves space in the repository and on the wire, not in memory.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from bench import report
from workers.drafters.tensors import TensorIndex

_MATRIX = re.compile(r"(^|\.)(fc|[qkvo]_proj|(gate|up|down)_proj|lm_head)\.weight$")


def quantize(folder: Path, out: Path, bits: int, group_size: int) -> dict[str, Any]:
    """Write OUT and tell what became of it.

    Raises:
        BadModel: FOLDER holds no safetensors file.
        ValueError: the drafter is quantised already, or two of its files would be one.
    """
    index = TensorIndex(folder)
    config = json.loads((folder / "config.json").read_text())
    if "quantization" in config:
        raise ValueError(f"{folder} is quantised already")
    if len(index.files) != 1:
        raise ValueError(f"{folder} holds {len(index.files)} safetensors files; one is expected")
    arrays, metadata = mx.load(str(index.files[0]), return_metadata=True)
    assert isinstance(arrays, dict) and isinstance(metadata, dict), "a safetensors file loads as two dicts"
    written: dict[str, mx.array] = {}
    num_quantized = 0
    for name, array in arrays.items():
        if _MATRIX.search(name) is None or array.shape[-1] % group_size:
            written[name] = array
            continue
        stem = name.removesuffix(".weight")
        written[name], written[stem + ".scales"], written[stem + ".biases"] = mx.quantize(array, group_size, bits)
        num_quantized += 1
    out.mkdir(parents=True, exist_ok=True)
    # The metadata stays: "format" tells which convention the norms follow.
    mx.save_safetensors(str(out / "model.safetensors"), written, metadata)
    config["quantization"] = {"group_size": group_size, "bits": bits, "mode": "affine"}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if (folder / "README.md").exists() and out.resolve() != folder.resolve():
        shutil.copyfile(folder / "README.md", out / "README.md")
    return {
        "num_tensors": len(arrays),
        "num_quantized": num_quantized,
        "bytes_before": index.files[0].stat().st_size,
        "bytes_after": (out / "model.safetensors").stat().st_size,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.quantize_drafter", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, default=8, choices=(4, 5, 6, 8))
    parser.add_argument("--group-size", type=int, default=64, choices=(32, 64, 128))
    args = parser.parse_args(argv)
    report.print_last_line(quantize(args.folder, args.out, args.bits, args.group_size))
    return 0


if __name__ == "__main__":
    sys.exit(main())
