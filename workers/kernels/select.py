"""At start: asks the machine's kernel to prove itself for the model's layers, and says what came of it."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import msgspec

from shared.errors import BadConfig
from workers.cache.spec import AttentionSpec
from workers.kernels.base import MAX_ROWS, PagedAttention
from workers.kernels.choice import AttentionChoice, Form, ShapeClass
from workers.kernels.cuda import CudaAttention, supports
from workers.kernels.metal import MetalAttention
from workers.kernels.prove import choose, compile_kernels, tiles_are_right
from workers.machine import device_name

logger = logging.getLogger("target")

VERIFY_ROWS = (2, 4, 8, 16)  # widths that the engine pads verify rows to
FORMAT = "attention-2"


class Found(msgspec.Struct, frozen=True):
    """What a check found, kept in the cache folder: in the order of the shape classes."""

    is_used: list[bool]
    reasons: list[str]


def select(
    layers: Sequence[tuple[AttentionSpec, int]],
    dtype: mx.Dtype,
    setting: str,
    *,
    is_speculative: bool,
    cache_folder: Path,
    widths: Sequence[int] | None = None,
    is_paged: bool = False,
    shared: Sequence[tuple[AttentionSpec, int]] = (),
    form: Form = "apart",
) -> AttentionChoice | None:
    """The kernels that serve, None where stock operations do everything.

    Args:
        layers: each attention layer and its number of query heads.
        setting: "auto", "stock" or "kernel".
        is_speculative: verify rows will come.
        cache_folder: keeps what "auto" found, by device, MLX version and the kernel's text.
        widths: query rows a sequence that will come; None: those of a target.
        is_paged: blocks will be handed over, not slots.
        shared: those of `layers` whose keys and values other layers read, too.
        form: how the layers hand over decode and verify rows.
    Raises:
        BadConfig: "kernel" was asked for, and there is none or it gives other values.
    """
    if setting == "stock":
        return None
    attention = machine_kernel()
    if attention is None:
        _check_none_is_wanted(setting, "no attention kernel for this machine")
        return None
    if widths is None:
        widths = target_widths(is_speculative=is_speculative, has_chunks=isinstance(attention, CudaAttention))
    apart = widths if form == "apart" else [r for r in widths if r == 0]  # what writes a chunk for MLX's own operation
    shapes = shape_classes(layers, dtype, widths, form=form) if form != "apart" else []
    shapes += shape_classes(layers, dtype, apart) + shape_classes(shared, dtype, widths, is_shared=True)
    if not shapes:
        _check_none_is_wanted(setting, "no attention kernel for this model's layers")
        return None
    path = cache_folder / FORMAT / f"{fingerprint(shapes, is_paged=is_paged)}.json"
    choice = _read(path, attention, shapes) if setting == "auto" else None
    if choice is not None:
        choice = _compiled(choice, is_paged=is_paged)
    if choice is None:
        started = time.perf_counter()
        choice = choose(attention, shapes, is_forced=setting == "kernel", is_paged=is_paged)
        logger.info("attention kernels checked in %.1f s", time.perf_counter() - started)
        if setting == "auto":
            _write(path, choice, shapes)
    used = [shape for shape, is_used in choice.is_used.items() if is_used]
    choice.has_tiles = choice.may_have_tiles and tiles_are_right(attention, used, is_paged=is_paged)
    for reason in choice.reasons:
        logger.info("attention: %s", reason)
    if setting == "kernel" and not all(choice.is_used.values()):
        raise BadConfig(f"TANDEM_ATTENTION=kernel: {'; '.join(choice.reasons)}")
    return choice


def _compiled(choice: AttentionChoice, *, is_paged: bool) -> AttentionChoice | None:
    """Known from an earlier start, and compiled anew: MLX keeps no compiled kernel of ours. None: it fails now."""
    started = time.perf_counter()
    try:
        used = [shape for shape, is_used in choice.is_used.items() if is_used]
        compile_kernels(choice.attention, used, is_paged=is_paged)
    except (RuntimeError, ValueError) as error:
        logger.warning("attention kernels that worked before fail now: %s", str(error)[:200])
        return None
    logger.info("attention kernels compiled in %.1f s", time.perf_counter() - started)
    return choice


def fingerprint(shapes: Sequence[ShapeClass], *, is_paged: bool = False) -> str:
    """Changes with whatever may change the outcome of a check."""
    graphs = os.environ.get("MLX_USE_CUDA_GRAPHS", "1")  # models differ in it that have layers of one shape
    names = [shape.name for shape in shapes]
    layout = "paged" if is_paged else "slots"
    digest = hashlib.sha256(f"{device_name()} {version('mlx')} graphs {graphs} {layout} {names}".encode())
    for name in ("attention.cuh", "numbers.cuh", "attention.metal", "cuda.py", "metal.py", "prove.py"):
        digest.update(Path(__file__).with_name(name).read_bytes())
    for file in sorted((Path(__file__).parent.parent / "cache").glob("*.py")):  # what hands kernels pools and tables
        digest.update(file.read_bytes())
    return digest.hexdigest()[:32]


def _read(path: Path, attention: PagedAttention, shapes: Sequence[ShapeClass]) -> AttentionChoice | None:
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Found)
    except (OSError, msgspec.DecodeError):
        return None
    if len(found.is_used) != len(shapes):
        return None
    return AttentionChoice(attention, dict(zip(shapes, found.is_used, strict=True)), tuple(found.reasons))


def _write(path: Path, choice: AttentionChoice, shapes: Sequence[ShapeClass]) -> None:
    found = Found(is_used=[choice.is_used[shape] for shape in shapes], reasons=list(choice.reasons))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.encode(found))
    except OSError as error:
        logger.warning("cannot keep the attention check: %s", error)


def machine_kernel() -> PagedAttention | None:
    if mx.default_device().type == mx.DeviceType.cpu:
        return None
    if mx.metal.is_available():
        return MetalAttention()
    return CudaAttention() if mx.cuda.is_available() else None


def target_widths(*, is_speculative: bool, has_chunks: bool) -> list[int]:
    """Query rows a sequence in a target's forwards; 0 is a prefill chunk, and MAX_ROWS a tile of one. Decode first."""
    verify = [r for r in VERIFY_ROWS if is_speculative or r == MAX_ROWS]
    return [1, *([0] if has_chunks else []), *verify]


def shape_classes(
    layers: Sequence[tuple[AttentionSpec, int]],
    dtype: mx.Dtype,
    widths: Sequence[int],
    *,
    is_shared: bool = False,
    form: Form = "apart",
) -> list[ShapeClass]:
    """What the layers need, as far as a kernel was written for it; none is for chunks of shared or joined keys."""
    kinds = dict.fromkeys((num_heads, spec.num_kv_heads, spec.key_dim, spec.value_dim) for spec, num_heads in layers)
    return [
        ShapeClass(num_heads, num_kv_heads, dim, r, dtype, is_shared, form)
        for r in widths
        for num_heads, num_kv_heads, dim, value_dim in kinds
        if (r > 0 or not (is_shared or form != "apart"))
        and dim == value_dim
        and supports(num_heads, num_kv_heads, dim, dtype.size, max(r, 1))
    ]


def _check_none_is_wanted(setting: str, reason: str) -> None:
    if setting == "kernel":
        raise BadConfig(f"TANDEM_ATTENTION=kernel: {reason}")
