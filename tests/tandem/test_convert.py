"""Conversions load in mlx-lm and in Tandem and give equal tokens; encoders stay as they are."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model
from PIL import Image

from shared.errors import BadConfig, BadModel, Unavailable
from shared.model_files import ModelFiles
from tandem import generate, load
from tandem.convert import check_upload, convert, upload
from tests.support import tiny_model
from tests.workers.gemma.hf import GEMMA3, GEMMA4
from workers.convert import checkpoint
from workers.convert.quantization import RECIPES
from workers.load import load as load_weights
from workers.models.gemma.model import Gemma, MultimodalConfig

pytestmark = pytest.mark.mlx

PROMPT = list(b"Two wheels, two riders, one ")
NUM_TOKENS = 16
IS_LONG = "CONVERT_LONG" in os.environ  # `make test-convert`: every form, not one of each kind
FORMS: list[dict[str, Any]] = [
    *({"bits": bits} for bits in ((2, 3, 4, 5, 6, 8) if IS_LONG else (3, 8))),
    {"bits": 4, "group_size": 32},
    *([{"bits": 8, "group_size": 128}] if IS_LONG else []),
    {"mode": "mxfp4"},
    {"mode": "mxfp8"},
    {"mode": "nvfp4"},
    *({"recipe": recipe} for recipe in (RECIPES if IS_LONG else RECIPES[:1])),
    {"dtype": "bfloat16"},
]


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that groups of 128 weights divide."""
    for name, size in {"HIDDEN": 128, "INNER": 256, "HEAD_DIM": 32}.items():
        monkeypatch.setattr(tiny_model, name, size)


@pytest.fixture
def source(wide: None, tmp_path: Path) -> Path:
    return tiny_model.write(tmp_path / "source")


def tandem_tokens(folder: Path, **options: Any) -> list[int]:
    with load(str(folder), "none", dtype="float32", blas_threads=1, prefix_cache=False) as model:
        prompt = options.pop("messages", PROMPT)
        result = generate(model, prompt, temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, **options)
        return result.token_ids


def mlx_lm_tokens(folder: Path) -> list[int]:
    model, _ = load_model(folder)
    model.set_dtype(mx.float32)  # as Tandem computes on a CPU; what is packed stays so
    return [int(token) for token, _ in generate_step(mx.array(PROMPT), model, max_tokens=NUM_TOKENS)]


def tensors(folder: Path) -> dict[str, mx.array]:
    found: dict[str, mx.array] = {}
    for path in sorted(folder.glob("*.safetensors")):
        loaded = mx.load(str(path))
        assert isinstance(loaded, dict)
        found |= loaded
    return found


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form.values())))
def test_a_conversion_gives_equal_tokens_in_mlx_lm_and_in_tandem(source: Path, tmp_path: Path, form: Any) -> None:
    done = convert(str(source), tmp_path / "made", **form)
    expected = mlx_lm_tokens(tmp_path / "made")
    assert tandem_tokens(tmp_path / "made") == expected
    assert len(set(expected)) > 3, "the model repeats itself"
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    if "dtype" in form:
        assert "quantization" not in config and done.bits_per_weight == 16
        assert all(tensor.dtype == mx.bfloat16 for tensor in tensors(tmp_path / "made").values())
        return
    assert config["quantization"]["mode"] == form.get("mode", "affine")
    bits = form.get("bits", 8 if form.get("mode") == "mxfp8" else 4)
    assert done.bits_per_weight > bits - 2 and done.bits_per_weight < bits + 2.5
    widths = {value["bits"] for value in config["quantization"].values() if isinstance(value, dict)}
    recipe = form.get("recipe")
    assert widths == (set(map(int, recipe.split("_")[1:])) if recipe else set())


def test_a_packed_model_is_unpacked_to_what_it_computed_with(source: Path, tmp_path: Path) -> None:
    convert(str(source), tmp_path / "packed", bits=4)
    convert(str(tmp_path / "packed"), tmp_path / "plain", dequantize=True, dtype="float32")
    weights = tensors(tmp_path / "plain")
    assert not any(name.endswith(".scales") for name in weights)
    packed = tensors(tmp_path / "packed")
    name = "model.layers.1.mlp.up_proj"
    expected = mx.dequantize(packed[f"{name}.weight"], packed[f"{name}.scales"], packed[f"{name}.biases"], 64, 4)
    assert mx.array_equal(weights[f"{name}.weight"], expected)
    assert "quantization" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert tandem_tokens(tmp_path / "plain") == tandem_tokens(tmp_path / "packed")


def test_a_vision_model_keeps_its_encoder_and_sees_with_it(wide: None, tmp_path: Path) -> None:
    source = tiny_model.write_qwen2_vl(tmp_path / "source")
    done = convert(str(source), tmp_path / "made", mode="mxfp8")
    before, after = tensors(source), tensors(tmp_path / "made")
    encoder = {name: array for name, array in before.items() if name.startswith("visual.")}
    assert len(encoder) == done.num_encoder_tensors > 10 and not done.is_text_only
    assert all(mx.array_equal(after[name], array) for name, array in encoder.items())
    assert after["language_model.model.layers.0.mlp.up_proj.weight"].dtype == mx.uint32
    assert not any("visual" in name and name.endswith(".scales") for name in after)
    assert tandem_tokens(tmp_path / "made") == mlx_lm_tokens(tmp_path / "made")
    pictures = []
    for seed in range(2):
        pixels = np.random.default_rng(seed).integers(0, 256, (24, 40, 3), dtype=np.uint8)
        pictures.append(tmp_path / f"{seed}.png")
        Image.fromarray(pixels).save(pictures[-1])
    question = [{"role": "user", "content": "What is this?"}]
    seen = [tandem_tokens(tmp_path / "made", messages=question, images=[picture]) for picture in pictures]
    assert seen[0] != seen[1], "the picture changes nothing"


VISION3 = {
    "hidden_size": 32, "image_size": 16, "patch_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 64,
}  # fmt: skip
MOE = {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 8, "moe_intermediate_size": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {**GEMMA3, "model_type": "gemma3_text"},
        "vision_config": VISION3,
        "mm_tokens_per_image": 4,
    },
    "gemma4": {"text_config": {**GEMMA4, **MOE, "model_type": "gemma4_text"}},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_our_own_families_are_packed_by_their_own_definition(family: str, tmp_path: Path) -> None:
    config = {"model_type": family, "tie_word_embeddings": True, **FAMILIES[family]}
    mx.random.seed(4)
    model = Gemma(MultimodalConfig.from_hf(config, 0))
    weights = {name: array + 0.1 * mx.random.normal(array.shape) for name, array in tree_flatten(model.parameters())}
    source = tmp_path / "source"
    source.mkdir()
    mx.save_safetensors(str(source / "model.safetensors"), weights, {"format": "mlx"})
    (source / "config.json").write_text(json.dumps(config))
    convert(str(source), tmp_path / "made", bits=8, group_size=32)
    tokens = mx.array([[5, 9, 3, 77, 20, 41]])
    logits = [
        np.array(load_weights(ModelFiles(name="m", folder=folder), "float32").model(tokens))
        for folder in (source, tmp_path / "made")
    ]
    np.testing.assert_allclose(logits[1], logits[0], rtol=0, atol=0.05 * float(np.abs(logits[0]).max()))
    after = tensors(tmp_path / "made")
    assert any(name.endswith("mlp.up_proj.scales") for name in after)
    if family == "gemma3":
        towers = {name for name in weights if name.startswith(("vision_tower.", "multi_modal_projector."))}
        assert len(towers) > 10 and all(mx.array_equal(after[name], weights[name]) for name in towers)
    else:
        packing = json.loads((tmp_path / "made" / "config.json").read_text())["quantization"]
        routers = {name: value for name, value in packing.items() if name.endswith("router.proj")}
        assert routers and all(value == {"group_size": 64, "bits": 8} for value in routers.values())


def test_large_models_are_written_in_shards(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(
        checkpoint, "make_shards", lambda weights, _: [{name: array} for name, array in weights.items()]
    )
    done = convert(str(source), tmp_path / "made", bits=4, on_progress=lambda *counts: seen.append(counts))
    files = sorted(path.name for path in (tmp_path / "made").glob("*.safetensors"))
    assert len(files) == len(seen) > 20 and files[0].startswith("model-00001-of-")
    assert seen[-1] == (done.num_bytes, done.num_bytes)
    assert tandem_tokens(tmp_path / "made") == mlx_lm_tokens(tmp_path / "made")


def test_the_rest_of_the_folder_comes_along(source: Path, tmp_path: Path) -> None:
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "remote_code.py").write_text("raise SystemExit")
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text("{}")
    convert(str(source), tmp_path / "made")
    made = {str(path.relative_to(tmp_path / "made")) for path in (tmp_path / "made").rglob("*") if path.is_file()}
    assert made == {
        "config.json", "model.safetensors", "model.safetensors.index.json", "README.md", "tokenizer.json",
        "tokenizer_config.json", "chat_template.jinja", "1_Pooling/config.json",
    }  # fmt: skip
    assert tandem_tokens(tmp_path / "made") == tandem_tokens(source)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"bits": 7}, "bits 7: mode affine has 2, 3, 4, 5, 6, 8"),
        ({"mode": "mxfp4", "bits": 8}, "bits 8: mode mxfp4 has 4"),
        ({"mode": "nvfp4", "group_size": 32}, "group_size 32: mode nvfp4 has 16"),
        ({"mode": "int4"}, "mode 'int4' is none of"),
        ({"recipe": "mixed_1_9"}, "recipe 'mixed_1_9' is none of"),
        ({"recipe": "mixed_2_6", "bits": 4}, "says the bits"),
        ({"recipe": "mixed_2_6", "mode": "mxfp4"}, "in mode affine"),
        ({"dequantize": True, "bits": 4}, "contradicts"),
        ({"dequantize": True}, "is not quantised"),
    ],
)
def test_what_cannot_be_is_refused(source: Path, tmp_path: Path, options: Any, told: str) -> None:
    with pytest.raises(BadConfig, match=told):
        convert(str(source), tmp_path / "made", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_sources_and_places_that_will_not_do(source: Path, tmp_path: Path) -> None:
    convert(str(source), tmp_path / "packed", bits=4)
    with pytest.raises(BadConfig, match="quantised already"):
        convert(str(tmp_path / "packed"), tmp_path / "again", bits=2)
    with pytest.raises(BadConfig, match="packed exists"):
        convert(str(source), tmp_path / "packed", bits=4)
    with pytest.raises(BadModel, match="no model at"):
        convert(str(tmp_path / "nowhere"), tmp_path / "made")
    (tmp_path / "file.gguf").write_bytes(b"")
    with pytest.raises(BadModel, match="GGUF"):
        convert(str(tmp_path / "file.gguf"), tmp_path / "made")
    with pytest.raises(BadConfig, match="cannot be written"):
        convert(str(source), source / "config.json" / "made")


def test_a_full_disk_leaves_nothing_behind(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write_index", full)
    with pytest.raises(BadConfig, match="No space left"):
        convert(str(source), tmp_path / "made", bits=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_an_upload_needs_a_name_a_token_and_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(BadConfig, match="like 'owner/name'"):
        check_upload("name")
    with pytest.raises(BadConfig, match="no Hugging Face token"):
        check_upload("owner/name")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "token")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(Unavailable, match="is complete"):
        upload(tmp_path, "owner/name")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BadConfig, match="HF_HUB_OFFLINE"):
        check_upload("owner/name")
