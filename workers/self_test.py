"""A short test of this machine: `python -m workers.self_test [tiny]`, a process of its own that `tandem doctor` starts.

Times a matrix product, loads the model of the settings (or makes a tiny one), generates greedily through the engine,
its caches and its attention kernels, and compares with one plain forward over the whole text. The last line on standard
output is the report as one JSON object.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import msgspec

from shared import config, log
from shared.errors import BadConfig, BadModel
from shared.messages import RequestId, SamplingParams, SequenceStart, Step, StepRow
from shared.model_files import resolve
from shared.supervise import EXIT_CONFIG
from workers import blas, no_torch

if TYPE_CHECKING:
    from workers.engine import Engine
    from workers.load import LoadedModel

NUM_TOKENS = 24
PROMPT = "The capital of France is"
TINY = {
    "model_type": "llama", "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 512, "vocab_size": 512, "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
}  # fmt: skip
PRODUCT_SIZE = 1024
PRODUCT_REPEATS = 3
# How far a chosen token's logit may be below the largest one of the plain forward, which adds in another order.
TOLERANCE = {"float32": 0.05, "bfloat16": 1.0, "float16": 0.25}


class Report(msgspec.Struct, frozen=True):
    """What the test found. `deficit` is the worst token's logit below the plain forward's largest; None for NaN."""

    mlx: str
    device: str
    blas: str
    gflops: float
    model: str
    dtype: str
    attention: list[str]  # kernels and why, as in /health; empty: stock operations
    load_s: float
    num_tokens: int
    tokens_per_s: float
    deficit: float | None
    is_right: bool
    text: str  # what was generated; empty for a model without a tokenizer


def run(settings: config.Settings, *, is_tiny: bool) -> Report:
    """Raises BadConfig, BadModel: what a server would refuse with."""
    files = None if is_tiny else resolve(settings.model, settings)
    blas_line = blas.prepare(settings)
    import importlib.metadata

    import mlx.core as mx

    from shared import tokenizer
    from workers.build import load_target, make_engine, warm_up
    from workers.machine import device_name

    started = time.perf_counter()
    loaded = tiny_model() if files is None else load_target(files, settings)
    engine, info = make_engine(loaded, settings)
    warm_up(engine, info)
    load_s = time.perf_counter() - started
    words = None if files is None else tokenizer.load(files).tokenizer
    prompt = list(range(1, 17)) if words is None else words.encode(PROMPT).ids
    began = time.perf_counter()
    output = generate(engine, prompt)
    seconds = time.perf_counter() - began
    logits = loaded.model(mx.array([prompt + output[:-1]]))[0, len(prompt) - 1 :].astype(mx.float32)
    chosen = mx.take_along_axis(logits, mx.array(output)[:, None], axis=1)[:, 0]
    deficit = mx.max(mx.max(logits, axis=1) - chosen).item()  # waits for the forward
    assert isinstance(deficit, float), "logits are real"
    return Report(
        mlx=importlib.metadata.version("mlx"),
        device=device_name(),
        blas=blas_line,
        gflops=product_gflops(),
        model=loaded.name,
        dtype=loaded.dtype,
        attention=info.attention,
        load_s=load_s,
        num_tokens=len(output),
        tokens_per_s=len(output) / seconds,
        deficit=deficit if deficit == deficit else None,
        is_right=deficit <= TOLERANCE[loaded.dtype],
        text="" if words is None else words.decode(output),
    )


def tiny_model() -> LoadedModel:
    """A Llama of two million random weights: what a machine without any model can be tested with."""
    import mlx.core as mx
    from mlx.utils import tree_map

    from workers.load import LoadedModel
    from workers.machine import is_cpu
    from workers.models.decoder import DecoderConfig, Model

    settings: dict[str, Any] = dict(TINY)
    mx.random.seed(0)
    model = Model(DecoderConfig.from_hf(settings, 0))
    dtype = mx.float32 if is_cpu() else mx.bfloat16
    model.update(tree_map(lambda array: array.astype(dtype), model.parameters()))
    model.fuse()
    mx.eval(model.parameters())
    return LoadedModel(
        model=model,
        config=settings,
        name="tiny random model",
        architecture="llama",
        fingerprint="self-test",
        eos_token_ids=[],
        max_model_len=int(settings["max_position_embeddings"]),
        vocab_size=int(settings["vocab_size"]),
        dtype="float32" if dtype == mx.float32 else "bfloat16",
    )


def generate(engine: Engine, prompt: list[int]) -> list[int]:
    """NUM_TOKENS greedy tokens in slot 0: one prefill, then one decode step for each."""
    start = SequenceStart(
        slot=0,
        request_id=RequestId("self-test"),
        sampling=SamplingParams(temperature=0.0),
        num_prompt_tokens=len(prompt),
        token_ids=prompt,
    )
    capacity = len(prompt) + NUM_TOKENS
    row = StepRow(slot=0, start=0, capacity=capacity, token_ids=prompt)
    step = Step(epoch=0, step_id=0, starts=[start], decodes=[], prefills=[row])
    output = list(engine.finish(engine.begin(step)).rows[0].token_ids)
    while len(output) < NUM_TOKENS:
        row = StepRow(slot=0, start=len(prompt) + len(output) - 1, capacity=capacity)
        step = Step(epoch=0, step_id=0, starts=[], decodes=[row], prefills=[])
        output += engine.finish(engine.begin(step)).rows[0].token_ids
    return output


def product_gflops() -> float:
    """Speed of a float32 product of two square matrices, the best of a few, after one that warms up."""
    import mlx.core as mx

    a = mx.random.normal((PRODUCT_SIZE, PRODUCT_SIZE))
    mx.eval(a, a @ a)
    best = float("inf")
    for _ in range(PRODUCT_REPEATS):
        began = time.perf_counter()
        mx.eval(a @ a)
        best = min(best, time.perf_counter() - began)
    return 2 * PRODUCT_SIZE**3 / best / 1e9


def main() -> int:
    try:
        settings = config.load()
        log.set_up("self-test", "error")
        no_torch.leave_out()
        report = run(settings, is_tiny=sys.argv[1:] == ["tiny"])
    except (BadConfig, BadModel) as error:
        print(error.message, file=sys.stderr)
        return EXIT_CONFIG
    print(msgspec.json.encode(report).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
