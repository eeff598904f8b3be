"""What is read of an adapter's folder, and what is refused."""

from __future__ import annotations

import os

os.environ.setdefault("MLX_DISABLE_COMPILE", "1")

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from shared.errors import BadModel
from shared.model_files import ModelFiles
from tests.support import tiny_model
from tests.support.tiny_adapter import write_mlx, write_peft
from workers.adapters.checkpoint import read
from workers.load import load

pytestmark = pytest.mark.mlx

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj"
Q_SIZES = (tiny_model.HIDDEN, tiny_model.HEADS * tiny_model.HEAD_DIM)
SIZES = {Q: Q_SIZES, DOWN: (tiny_model.INNER, tiny_model.HIDDEN)}


def change(folder: Path, file: str, **tensors: np.ndarray | None) -> None:
    """Replace tensors of a file; None takes one away."""
    held = load_file(folder / file) | tensors
    save_file({name: tensor for name, tensor in held.items() if tensor is not None}, folder / file, {"format": "pt"})


@pytest.fixture
def model(tmp_path: Path) -> ModelFiles:
    return ModelFiles(name="m", folder=tiny_model.write(tmp_path / "model"))


def test_both_forms_hold_the_same_pairs(tmp_path: Path) -> None:
    ours = read("a", str(write_mlx(tmp_path / "mlx", SIZES, rank=4, scale=2.0)))
    theirs = read("b", str(write_peft(tmp_path / "peft", SIZES, rank=4, alpha=8.0)))
    assert ours.rank == theirs.rank == 4
    assert ours.pairs.keys() == theirs.pairs.keys() == SIZES.keys()
    for key, (size_in, size_out) in SIZES.items():
        for pair in (ours.pairs[key], theirs.pairs[key]):
            assert pair[0].shape == (size_in, 4) and pair[1].shape == (4, size_out)
        np.testing.assert_array_equal(np.array(ours.pairs[key][0]), np.array(theirs.pairs[key][0]))
        np.testing.assert_array_equal(np.array(ours.pairs[key][1]), np.array(theirs.pairs[key][1]))


def test_the_fingerprint_tells_other_weights_and_another_scale(tmp_path: Path) -> None:
    prints = [
        read("a", str(write_peft(tmp_path / name, SIZES, **changes))).fingerprint
        for name, changes in (("one", {}), ("same", {}), ("seed", {"seed": 1}), ("scale", {"alpha": 9.0}))
    ]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_names_that_peft_writes_in_other_ways_are_read(tmp_path: Path) -> None:
    """With the adapter's name in them, and of a model without the usual wrapper."""
    folder = write_peft(tmp_path, {Q: Q_SIZES})
    file = folder / "adapter_model.safetensors"
    pair = load_file(file)
    renamed = {
        name.replace("base_model.model.", "").replace(".weight", ".default.weight"): t for name, t in pair.items()
    }
    save_file(renamed, file, {"format": "pt"})
    assert read("a", str(folder)).pairs.keys() == {Q}


@pytest.mark.parametrize("prefix", ["", "model.language_model.", "language_model.model.", "transformer."])
def test_a_projection_is_found_by_its_place_in_the_layers(tmp_path: Path, model: ModelFiles, prefix: str) -> None:
    place = write_mlx(tmp_path / "a", {f"{prefix}layers.0.self_attn.q_proj": Q_SIZES})
    loaded = load(model, "float32", adapter_places={"a": str(place)})
    assert loaded.adapters is not None and loaded.adapters.names == ["a"]
    plain = np.array(loaded.model(mx.array([[5, 6, 7]])))
    loaded.adapters.select(["a"])
    assert np.abs(np.array(loaded.model(mx.array([[5, 6, 7]]))) - plain).max() > 0.01


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("use_dora", True),
        ("bias", "all"),
        ("modules_to_save", ["lm_head"]),
        ("fan_in_fan_out", True),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("layer_replication", [[0, 4]]),
        ("trainable_token_indices", [5]),
        ("peft_type", "IA3"),
        ("init_lora_weights", "pissa_niter_4"),
        ("lora_alpha", None),
        ("lora_alpha", "8"),
        ("lora_alpha", True),
        ("lora_alpha", float("nan")),
        ("alpha_pattern", {"q_proj": "much"}),
        ("alpha_pattern", {"(": 1}),
        ("alpha_pattern", [1]),
    ],
)
def test_peft_options_that_mean_more_are_refused(tmp_path: Path, option: str, value: Any) -> None:
    place = write_peft(tmp_path, SIZES, **{option: value})
    with pytest.raises(BadModel, match=f"adapter 'a': .*{option}"):
        read("a", str(place))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"fine_tune_type": "dora"}, "'dora' is not supported"),
        ({"fine_tune_type": "full"}, "'full' is not supported"),
        ({"lora_parameters": None}, "neither peft_type nor lora_parameters"),
        ({"lora_parameters": {"rank": 4}}, "scale is None"),
    ],
)
def test_mlx_options_that_mean_more_are_refused(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    place = write_mlx(tmp_path, SIZES, **config)
    with pytest.raises(BadModel, match=f"adapter 'a': .*{words}"):
        read("a", str(place))


def one(rows: int, columns: int) -> np.ndarray:
    return np.ones((rows, columns), np.float32)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({f"{Q}.m": np.ones(8, np.float32)}, "no part of a LoRA pair"),
        ({"lm_head.weight": one(8, 8)}, "no part of a LoRA pair"),
        ({f"{Q}.lora_a": None}, "one half of a pair"),
        ({f"{Q}.lora_a": one(tiny_model.HIDDEN, 3)}, "pair of shapes"),
        ({f"{Q}.lora_a": np.ones((2, tiny_model.HIDDEN, 4), np.float32)}, "pair of shapes"),
        ({f"{Q}.lora_a": one(tiny_model.HIDDEN, 0), f"{Q}.lora_b": one(0, Q_SIZES[1])}, "pair of shapes"),
        (dict.fromkeys([f"{path}.lora_{half}" for path in SIZES for half in "ab"]), "no adapter"),
    ],
)
def test_tensors_that_are_no_pairs_are_refused(tmp_path: Path, tensors: dict[str, Any], words: str) -> None:
    place = write_mlx(tmp_path, SIZES)
    change(place, "adapters.safetensors", **tensors)
    with pytest.raises(BadModel, match=f"adapter 'a': .*{words}"):
        read("a", str(place))


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"model.layers.9.self_attn.q_proj": Q_SIZES}, "no linear layer 'model.layers.9.self_attn.q_proj'"),
        ({"model.embed_tokens": (4, 4)}, "no linear layer"),
        ({"lm_head": (4, 4)}, "no linear layer"),
        ({"visual.blocks.0.attn.proj": (4, 4)}, "no linear layer"),
        ({"model.layers.0.mlp.experts.3.up_proj": (4, 4)}, "no linear layer"),
        ({Q: (Q_SIZES[0] + 1, Q_SIZES[1])}, "numbers, the model's"),
        ({Q: Q_SIZES, "layers.0.self_attn.q_proj": Q_SIZES}, "two of its pairs"),
    ],
)
def test_adapters_of_another_model_are_refused(
    tmp_path: Path, model: ModelFiles, sizes: dict[str, tuple[int, int]], words: str
) -> None:
    place = write_peft(tmp_path / "a", sizes)
    with pytest.raises(BadModel, match=f"adapter 'other': .*{words}"):
        load(model, "float32", adapter_places={"other": str(place)})


def test_folders_that_hold_none_are_refused(tmp_path: Path) -> None:
    place = write_peft(tmp_path / "a", SIZES)
    file = place / "adapter_model.safetensors"
    whole = file.read_bytes()
    for damaged in (whole[:-7], whole[:4], b"", b"\xff" * 64):
        file.write_bytes(damaged)
        with pytest.raises(BadModel, match=r"adapter 'a': adapter_model\.safetensors"):
            read("a", str(place))
    file.unlink()
    with pytest.raises(BadModel, match=r"holds no adapter_model\.safetensors"):
        read("a", str(place))
    for text in ("{", "[]", "\udcff", "[" * 100_000):
        (place / "adapter_config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(BadModel, match=r"adapter_config\.json"):
            read("a", str(place))
    with pytest.raises(BadModel, match="nothing at"):
        read("a", str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadModel, match=r"adapter_config\.json cannot be read"):
        read("a", str(tmp_path / "empty"))
