"""8-bit checkpoints of every kind: smaller files, nearly the same logits, whatever names a layout gives its tensors."""

from __future__ import annotations

import json

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

import tiny_checkpoints as tiny  # noqa: E402 - MLX may be missing

from bench.quantize_drafter import main, quantize  # noqa: E402 - needs MLX
from shared.errors import BadModel  # noqa: E402 - after the check for MLX
from workers.drafters.checkpoint import detect  # noqa: E402 - needs MLX
from workers.drafters.registry import load_drafter, load_fusion, tables  # noqa: E402 - needs MLX
from workers.drafters.tensors import load_arrays  # noqa: E402 - needs MLX

pytestmark = pytest.mark.mlx

WIDTH = 128  # of hidden rows and inner layers: whole groups
NUM_ROWS, K = 7, 4
CLOSE = 0.03  # of the logits' spread; 8 bits of a normal weight are off by about 0.3 % each

MAKERS = {
    "dflash": tiny.dflash,
    "eagle3": tiny.eagle3,
    "eagle3 speculators": lambda folder: tiny.eagle3(folder, rename_layer="layers.0."),
    "eagle3 reduced": lambda folder: tiny.eagle3(folder, draft_vocab_size=32, own_head=True),
    "mtp": tiny.mtp,
    "mtp qwen": lambda folder: tiny.mtp(folder, qwen=True),
}


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "H", WIDTH)
    monkeypatch.setattr(tiny, "FFN", WIDTH)
    monkeypatch.setitem(tiny.DIMENSIONS, "hidden_size", WIDTH)
    monkeypatch.setitem(tiny.DIMENSIONS, "intermediate_size", WIDTH)


def drafted_logits(folder):
    """(K, V): one sequence's logits at each draft step, every step fed with the same tokens."""
    random = np.random.default_rng(5)
    embedding = mx.array(random.standard_normal((tiny.V, WIDTH)).astype(np.float32))
    config = detect(folder)
    taps = [
        mx.array(random.standard_normal((NUM_ROWS, WIDTH)).astype(np.float32)) for _ in range(max(1, len(config.taps)))
    ]
    drafter = load_drafter(config, mx.float32, *tables(embedding))
    state, logits = drafter.new_state(), []

    def same_tokens(row, step):
        logits.append(np.array(row[0]))
        return mx.array([step + 3])

    drafter.extend([state], [load_fusion(config, mx.float32)(taps)], [list(range(NUM_ROWS))])
    mx.eval(drafter.draft([state], [1], K, same_tokens).token_ids)
    return np.stack(logits)


@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("kind", MAKERS)
def test_logits_stay_close(tmp_path, kind, group_size):
    folder, _ = MAKERS[kind](tmp_path / "plain")
    told = quantize(folder, tmp_path / "small", 8, group_size)
    assert told["num_quantized"] > 0
    assert told["bytes_after"] < 0.5 * told["bytes_before"]  # from float32, with headers
    want, got = drafted_logits(folder), drafted_logits(tmp_path / "small")
    finite = np.isfinite(want)
    assert (np.isfinite(got) == finite).all()
    assert np.abs(got[finite] - want[finite]).max() < CLOSE * np.ptp(want[finite])
    assert np.abs(got[finite] - want[finite]).max() > 0, "nothing was quantised"


def test_layers_with_settings_of_their_own_are_found_by_their_stored_names(tmp_path):
    """Mixed quantisation: MLX's configurations name the module as the file does, `mtp.` and `midlayer.` included."""
    for kind, module in (("mtp", "mtp.fc"), ("eagle3", "midlayer.mlp.up_proj")):
        folder, _ = MAKERS[kind](tmp_path / kind)
        quantize(folder, tmp_path / f"{kind}-4", 4, 32)
        quantize(folder, tmp_path / f"{kind}-8", 8, 64)
        arrays, other = (mx.load(str(tmp_path / f"{kind}-{b}" / "model.safetensors")) for b in (8, 4))
        arrays |= {name: array for name, array in other.items() if name.startswith(module + ".")}
        mx.save_safetensors(str(tmp_path / f"{kind}-8" / "model.safetensors"), arrays)
        settings = {"group_size": 64, "bits": 8, module: {"group_size": 32, "bits": 4}}
        name = module.removeprefix("mtp.").replace("midlayer.", "layers.0.") + ".weight"
        plain = load_arrays(folder, kind, mx.float32, None)
        mixed = load_arrays(tmp_path / f"{kind}-8", kind, mx.float32, settings)
        assert mixed[name].shape == plain[name].shape
        assert float(mx.abs(mixed[name] - plain[name]).mean()) < 0.1 * float(mx.abs(plain[name]).mean())


def test_settings_that_do_not_fit_the_tensors_are_a_bad_model(tmp_path):
    folder, _ = tiny.mtp(tmp_path / "plain")
    quantize(folder, tmp_path / "small", 8, 64)
    with pytest.raises(BadModel, match="does not fit its quantisation"):
        load_arrays(tmp_path / "small", "mtp", mx.float32, {"group_size": 32, "bits": 8})


def test_the_command_writes_what_the_workers_read(tmp_path, capsys):
    folder, _ = tiny.mtp(tmp_path / "plain", metadata={"format": "pt"})
    (folder / "README.md").write_text("a card")
    assert main([str(folder), str(tmp_path / "small"), "--group-size", "32"]) == 0
    assert json.loads(capsys.readouterr().out)["num_quantized"] == 8
    assert (tmp_path / "small" / "README.md").read_text() == "a card"
    assert json.loads((tmp_path / "small" / "config.json").read_text())["quantization"]["group_size"] == 32
    assert detect(tmp_path / "small").kind == "mtp"
    with pytest.raises(ValueError, match="quantised already"):
        quantize(tmp_path / "small", tmp_path / "again", 8, 64)
