"""`load`, `generate` and `stream_generate`: what a caller gets, and what is refused."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from frontend.schemas import ChatBody
from shared.errors import BadConfig, BadModel, EngineFailure, InvalidRequest, Unavailable
from tandem import LocalModel, generate, load, stream_generate
from tandem.options import Options
from tests.support import tiny_model
from tests.support.clips import moving, written

pytestmark = pytest.mark.mlx

GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 20, "ignore_eos": True}
CHAT = [{"role": "user", "content": "Hello"}]


def test_importing_tandem_imports_neither_mlx_nor_the_processes() -> None:
    code = (
        "import sys, tandem; tandem.Stats; from tandem import TandemError; "
        "print([n for n in ('mlx', 'mlx_lm', 'frontend', 'scheduler', 'workers', 'transformers') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_pieces_make_the_whole(model: LocalModel) -> None:
    whole = generate(model, CHAT, **GREEDY)
    pieces = list(stream_generate(model, CHAT, **GREEDY))
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [t for piece in pieces for t in piece.token_ids] == whole.token_ids
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]
    counts = [piece.stats.num_output_tokens for piece in pieces]
    assert counts == sorted(counts) and counts[-1] == 20
    assert whole.stats.num_prompt_tokens > 5 and whole.stats.peak_memory_bytes > 0
    assert whole.stats.tokens_per_s > 0 and whole.stats.prompt_tokens_per_s > 0


def test_a_stop_string_is_not_part_of_the_output(model: LocalModel) -> None:
    whole = generate(model, "abc", **GREEDY)
    stop = whole.text[3:5]
    stopped = generate(model, "abc", **GREEDY, stop=[stop])
    assert stopped.finish_reason == "stop"
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert stopped.token_ids == whole.token_ids[: len(stopped.token_ids)]


def test_several_prompts_share_steps_and_keep_their_order(model: LocalModel) -> None:
    prompts = ["one", "two", "three"]
    alone = [generate(model, prompt, **GREEDY).token_ids for prompt in prompts]
    seen = [piece.index for piece in stream_generate(model, prompts, **GREEDY)]
    assert [result.token_ids for result in generate(model, prompts, **GREEDY)] == alone
    assert seen.index(2) < len(seen) - 1 - seen[::-1].index(0), "the third began when the first had ended"


def test_threads_share_the_model(model: LocalModel) -> None:
    prompts = ["first", "second", "third", "fourth", "fifth"]
    alone = [generate(model, prompt, **GREEDY).token_ids for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        assert list(pool.map(lambda prompt: generate(model, prompt, **GREEDY).token_ids, prompts)) == alone


def test_the_paged_layout_gives_the_same_tokens_with_and_without_a_hit(model: LocalModel, folder: Path) -> None:
    prompts = ["a prefix that is longer than one block of the cache, which is thirty-two tokens" + end for end in "xyz"]
    expected = [generate(model, prompt, **GREEDY).token_ids for prompt in prompts]
    with load(str(folder), "none", dtype="float32", max_num_seqs=4, blas_threads=1, kv_layout="paged") as paged:
        assert [result.token_ids for result in generate(paged, prompts, **GREEDY)] == expected
        again = generate(paged, prompts[0], **GREEDY)
    assert again.token_ids == expected[0]
    assert again.stats.num_cached_tokens >= 32
    with pytest.raises(BadConfig, match="no attention kernel"):
        load(str(folder), "none", dtype="float32", blas_threads=1, kv_layout="paged", attention="kernel")


def test_it_works_where_an_event_loop_runs(model: LocalModel) -> None:
    async def notebook() -> str:
        return generate(model, "cell", **GREEDY).text

    assert asyncio.run(notebook()) == generate(model, "cell", **GREEDY).text


def test_a_closed_stream_frees_its_slot(model: LocalModel) -> None:
    with stream_generate(model, "abc", temperature=0.0, max_tokens=400, ignore_eos=True) as stream:
        first = next(stream)
    assert first.token_ids and stream.stats[0].num_output_tokens < 400
    assert list(stream) == []

    async def num_running() -> int:
        return model._engine.processes.core.status().num_running

    generate(model, "x", max_tokens=1)  # a step later
    assert model._loop.call(num_running()) == 0


def test_logprobs_are_of_the_tokens_that_came(model: LocalModel) -> None:
    for prompt in ("abc", CHAT):
        result = generate(model, prompt, **GREEDY, logprobs=True, top_logprobs=3)  # type: ignore[call-overload]
        assert [token.token_id for token in result.tokens] == result.token_ids
        for token in result.tokens:
            assert len(token.top) == 3 and token.top[0] == (token.token_id, token.logprob)
            assert token.top[0][1] >= token.top[1][1] >= token.top[2][1]


def test_outputs_follow_a_schema_a_choice_and_a_regular_expression(model: LocalModel) -> None:
    number = {"type": "integer", "minimum": 0, "maximum": 99}
    schema = {"type": "object", "properties": {"n": number}, "required": ["n"], "additionalProperties": False}
    assert 0 <= json.loads(generate(model, CHAT, json_schema=schema, temperature=0.0).text)["n"] <= 99
    assert generate(model, CHAT, choice=["yes", "no"], seed=1).text in ("yes", "no")
    assert len(generate(model, "A date: ", regex="[0-9]{4}-[0-9]{2}", temperature=0.0).text) == 7
    assert set(generate(model, "Go", grammar='start: "a" "b"+ "c"', seed=2, max_tokens=300).text) == set("abc")


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"temperatur": 0.0}, "temperatur"),
        ({"temperature": 3.0}, "temperature"),
        ({"max_tokens": 100_000}, "max_tokens"),
        ({"n": 2}, "n"),
        ({"stream": True}, "stream"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stop_token_ids": [10_000]}, "stop_token_ids"),
        ({"json_schema": {}, "regex": "a"}, "json_schema"),
        ({"regex": "("}, "structured_outputs.regex"),
        ({"thinking_budget": 5}, "thinking_budget"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"images": ["nowhere.png"]}, "images[0]"),
        ({"videos": ["nowhere.mp4"]}, "videos[0]"),
        ({"audio": "nowhere.wav"}, "audio[0]"),
    ],
)
def test_a_refusal_names_the_option(model: LocalModel, options: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        stream_generate(model, CHAT, **options)
    assert (refusal.value.param or "").startswith(param)
    assert param in str(refusal.value)


@pytest.mark.parametrize("prompt", ["", [], [""], [[]], [1, "a"], [{"role": "user"}], 5, [CHAT, 5], [10_000]])
def test_a_prompt_that_is_none_is_refused(model: LocalModel, prompt: Any) -> None:
    with pytest.raises(InvalidRequest):
        generate(model, prompt)


def test_options_of_a_conversation_need_one(model: LocalModel) -> None:
    with pytest.raises(InvalidRequest, match="enable_thinking: needs messages"):
        generate(model, "text", enable_thinking=True)


def test_options_are_the_apis_fields() -> None:
    """A field that the API gains must be offered here, or listed as one that makes no sense here."""
    without_sense = {
        "model", "stream", "stream_options", "n", "user", "metadata", "messages", "max_completion_tokens", "modalities",
        "service_tier", "store", "return_token_origins",
    }  # fmt: skip
    own = {"adapter", "json_schema", "regex", "choice", "grammar", "images", "videos", "audio"}
    assert set(Options.__annotations__) - own == set(ChatBody.__struct_fields__) - without_sense


def test_settings_are_checked(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="did you mean max_model_len"):
        load(str(folder), max_model_length=5)
    with pytest.raises(BadConfig, match="port: a setting of the server"):
        load(str(folder), port=5)
    with pytest.raises(BadConfig, match="max_model_len"):
        load(str(folder), max_model_len="long")
    with pytest.raises(BadModel, match="no model at"):
        load(str(tmp_path / "nowhere"))
    with pytest.raises(BadModel, match=r"config\.json"):
        load(str(tmp_path))


def test_a_failed_step_ends_what_runs_and_what_comes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(str(folder), "none", dtype="float32", blas_threads=1) as broken:
        monkeypatch.setattr(broken._engine.processes.engine, "finish", _fail)
        with pytest.raises(EngineFailure, match="out of memory"):
            generate(broken, "abc")
        with pytest.raises(EngineFailure, match="load the model again"):
            generate(broken, "abc")


def _fail(_step: object) -> None:
    raise RuntimeError("out of memory")


def test_a_closed_model_says_so(folder: Path) -> None:
    closed = load(str(folder), "none", dtype="float32", blas_threads=1)
    stream = stream_generate(closed, "abc", max_tokens=400, temperature=0.0, ignore_eos=True)
    next(stream)
    closed.close()
    closed.close()
    with pytest.raises(Unavailable, match="closed"):
        list(stream)
    with pytest.raises(Unavailable, match="closed"):
        generate(closed, "abc")


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for its threads")
def test_the_models_thread_is_gone_once_it_is_closed(folder: Path) -> None:
    """One that still ends while the interpreter does makes C++ abort the process."""
    closed = load(str(folder), "none", dtype="float32", blas_threads=1)
    task = Path(f"/proc/self/task/{closed._loop._thread.native_id}")
    generate(closed, "abc", max_tokens=1)
    assert task.exists()
    closed.close()
    assert not task.exists()


def test_images_come_by_path_and_stand_before_the_text(tmp_path: Path) -> None:
    paths = []
    for seed in range(2):
        pixels = np.random.default_rng(seed).integers(0, 256, (24, 40, 3), dtype=np.uint8)
        paths.append(tmp_path / f"{seed}.png")
        Image.fromarray(pixels).save(paths[-1])
    folder = tiny_model.write_qwen2_vl(tmp_path / "vision")
    with load(str(folder), "none", dtype="float32", blas_threads=1) as seeing:
        assert seeing.modalities == ["text", "image", "video"]
        uri = "data:image/png;base64," + base64.b64encode(paths[0].read_bytes()).decode()
        parts = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": "What?"}]
        question = [{"role": "user", "content": "What?"}]
        by_path = generate(seeing, question, images=[paths[0]], **GREEDY)
        assert by_path.token_ids == generate(seeing, [{"role": "user", "content": parts}], **GREEDY).token_ids
        assert by_path.token_ids != generate(seeing, question, images=[str(paths[1])], **GREEDY).token_ids
        assert generate(seeing, question, images=paths, **GREEDY).stats.num_prompt_tokens > 30
        for seed in range(2):
            (tmp_path / f"{seed}.mp4").write_bytes(written(moving(30, seed=seed)))
        watched = [generate(seeing, question, videos=[tmp_path / f"{seed}.mp4"], **GREEDY) for seed in range(2)]
        assert watched[0].token_ids != watched[1].token_ids
        assert watched[0].stats.num_prompt_tokens > 100
        with pytest.raises(InvalidRequest, match="No such file"):
            generate(seeing, question, images=[tmp_path / "nowhere.png"])
        with pytest.raises(InvalidRequest, match="audio input is not supported for this model"):
            generate(seeing, question, audio=[paths[0]])
