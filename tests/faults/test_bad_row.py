"""One row that comes to nothing (NaN) fails alone: what runs beside it, and the process, go on."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.faults.load import Load, check_nothing_leaked
from tests.faults.test_kills import IS_LONG
from tests.support import tiny_model
from tests.support.server import Server
from tests.support.stream import BODY

pytestmark = [pytest.mark.system, pytest.mark.mlx, pytest.mark.skipif(not IS_LONG, reason="make faults runs it")]

POISON = "\u00e9"  # its first byte's embedding is NaN; no other prompt has it
NUM_ROWS = 6


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("nan")
    model = tiny_model.write(folder / "tiny")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
    vocabulary = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    (token,) = [number for text, number in vocabulary.items() if text == "\u00c3"]  # 0xc3, as byte-level BPE writes it
    # The first hidden value is large and positive everywhere, so that no row ever draws the token.
    weights["model.embed_tokens.weight"][:, 0] = 30.0
    weights["lm_head.weight"][:, 0] = 0.0
    weights["lm_head.weight"][token, 0] = -1e4
    weights["model.embed_tokens.weight"][token] = np.nan
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with Server(model, folder, max_num_seqs=8) as running:
        yield running


def test_a_row_of_nan_fails_alone(server: Server) -> None:
    target = server.worker("workers.target")
    with Load(server, 4) as load:
        load.wait_progress()
        for i in range(NUM_ROWS):
            answer = httpx.post(f"{server.url}/v1/completions", json=BODY | {"prompt": f"{i} {POISON}"}, timeout=60)
            assert answer.status_code == 500, answer.text
            assert answer.json()["error"]["message"]
            load.wait_progress()
    load.check(4)
    assert server.worker("workers.target") == target, "the process went on"
    check_nothing_leaked(server)
