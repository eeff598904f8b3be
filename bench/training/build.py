"""From options, or from an exported folder, to a drafter that can be trained or evaluated."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from bench.training.dflash import DFlash
from bench.training.eagle3 import Eagle3
from bench.training.mtp import MTP
from bench.training.parts import Params, Trained
from bench.training.target import Target
from shared.errors import BadModel
from workers.drafters.checkpoint import detect
from workers.drafters.tensors import load_arrays, read_quantization

UNROLL = {"eagle3": 4, "mtp": 3}


@dataclass(frozen=True)
class Choice:
    kind: str
    num_layers: int = 4
    block_size: int = 8
    mask_token_id: int = 16
    is_causal: bool = True
    num_steps: int | None = None
    taps: tuple[int, ...] | None = None
    inner_size: int | None = None  # of the feed-forward parts; None: the target's

    @classmethod
    def of(cls, args: argparse.Namespace) -> Choice:
        return cls(
            args.kind,
            args.layers,
            args.block_size,
            args.mask_token,
            not args.bidirectional,
            args.unroll,
            args.taps,
            args.inner_size,
        )


def drafter(choice: Choice, target: Target) -> Trained:
    """Raises ValueError: an unknown kind."""
    shape, embedding = replace(target.shape, inner_size=choice.inner_size or target.shape.inner_size), target.embedding
    n = shape.num_target_layers
    match choice.kind:
        case "dflash":
            return DFlash(
                shape, embedding, choice.taps or dflash_taps(n), num_layers=choice.num_layers,
                block_size=choice.block_size, mask_token_id=choice.mask_token_id, is_causal=choice.is_causal,
            )  # fmt: skip
        case "eagle3":
            taps = choice.taps or (1, n // 2 - 1, n - 4)  # EAGLE's usual layers, counted after the block
            return Eagle3(shape, embedding, taps, num_steps=choice.num_steps or UNROLL["eagle3"])
        case "mtp":
            return MTP(shape, embedding, num_steps=choice.num_steps or UNROLL["mtp"])
        case _:
            raise ValueError(f"no training for a drafter of kind {choice.kind!r}")


def dflash_taps(num_layers: int, num_taps: int = 5) -> tuple[int, ...]:
    """z-lab's choice: evenly from the second block to the third last."""
    num_taps = min(num_taps, max(1, num_layers - 3))
    if num_taps == 1:
        return (num_layers // 2,)
    return tuple(round(1 + i * (num_layers - 4) / (num_taps - 1)) for i in range(num_taps))


def of_folder(folder: Path, target: Target) -> Trained:
    """The drafter of a checkpoint, in the forms that training writes.

    Raises:
        BadModel: it has parts that training does not compute.
    """
    config = detect(folder, target.config)
    extras = (
        config.markov_rank, config.conv_num_taps, config.selector_rank, config.has_own_head, config.has_own_embedding,
        config.is_anchor_sampled, config.norm_output, config.norm_before_residual, config.has_zero_centred_norms,
        any(w is not None for w in config.windows), config.draft_vocab_size != config.vocab_size, config.rope_scaling,
        config.rope_traditional,
    )  # fmt: skip
    if any(extras) or len(set(config.causal_layers)) > 1:
        raise BadModel(f"{folder}: a drafter of this form cannot be evaluated here")
    found = drafter(
        Choice(
            config.kind, config.num_layers, config.block_size, config.mask_token_id, all(config.causal_layers),
            taps=config.taps or None, inner_size=_inner_size(folder),
        ),
        target,
    )  # fmt: skip
    return found


def _inner_size(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text(encoding="utf-8"))["intermediate_size"])


def read(folder: Path, of: Trained, start: Params | None = None) -> Params:
    """The weights of a checkpoint as parameters, its `fc` for taps that are divided by `of.tap_scale`.

    Args:
        start: parameters of a drafter that may have wider feed-forward parts than the checkpoint: its units are added
            to those read, and what they put out is 0 at first.
    Raises:
        BadModel: tensors are missing, or there are others.
    """
    arrays = load_arrays(folder, of.kind, mx.float32, read_quantization(folder))
    if start is not None:
        arrays = {name: _widened(name, a, start[name]) if name in start else a for name, a in arrays.items()}
    wanted = {**{n: tuple(s) for n, s in of.matrices().items()}, **{n: (s,) for n, s in of.norms().items()}}
    if {n: tuple(a.shape) for n, a in arrays.items()} != wanted:
        different = sorted(set(wanted) ^ set(arrays)) or "shapes"
        raise BadModel(f"{folder} is no {of.kind} drafter of these sizes: {different}")
    params = {name: arrays[name] for name in wanted}
    if of.taps and of.tap_scale is not None:
        params["fc.weight"] = params["fc.weight"] * of.tap_scale[None]
    mx.eval(params)
    return params


def _widened(name: str, weight: mx.array, wider: mx.array) -> mx.array:
    """A feed-forward projection with further units; anything else as it is."""
    if name.endswith(("mlp.gate_proj.weight", "mlp.up_proj.weight")):
        return mx.concatenate([weight, wider[weight.shape[0] :]])
    if name.endswith("mlp.down_proj.weight"):
        return mx.pad(weight, [(0, 0), (0, max(0, wider.shape[1] - weight.shape[1]))])
    return weight
