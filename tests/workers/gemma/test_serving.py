"""Images and clips through scheduler core and engine: transformers' greedy tokens, whatever runs beside them."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import pytest

from scheduler.media import whole_end
from shared.messages import MediaItem, MediaTensor, SamplingParams
from tests.support.engine_rig import GREEDY, EngineRig, make_engine
from tests.workers.gemma import hf
from tests.workers.gemma.test_media import AUDIO, IMAGE, SIGLIP, VIDEO, frames, gemma4, padded

pytestmark = [pytest.mark.mlx, pytest.mark.oracle]

NUM_TOKENS = 16
CLASSES = [48, 160]
PATCH = 4
PLACEHOLDERS = (IMAGE, VIDEO, AUDIO)  # random weights would put them out, and transformers look for media then
NO_PLACEHOLDERS = SamplingParams(temperature=0.0, logit_bias=dict.fromkeys(PLACEHOLDERS, -100.0))


def pixels(height, width, seed):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def item(kind, name, array, num_tokens, grid=()):
    tensor = MediaTensor(name=name, dtype=str(array.dtype), shape=list(array.shape), data=array.tobytes())
    digest = hashlib.sha256(tensor.data).digest()
    return MediaItem(
        kind=kind, start=0, num_tokens=num_tokens, content_hash=digest, tensors=[tensor], grid=list(grid)
    )  # fmt: skip


def image(height, width, seed):
    """Gemma 4's, pooled by two."""
    grid = [1, height // PATCH, width // PATCH]
    return item("image", "pixels", pixels(height, width, seed), grid[1] * grid[2] // 4, grid)


def clip(count):
    return item("audio", "frames", frames(count, count), -(-count // 4))


def prompt(*parts):
    """(tokens, media in their places) of token lists and media items."""
    tokens, media = [], []
    for part in parts:
        if isinstance(part, MediaItem):
            place = {"image": IMAGE, "audio": AUDIO}[part.kind]
            media.append(MediaItem(**{f: getattr(part, f) for f in part.__struct_fields__} | {"start": len(tokens)}))
            tokens += [place] * part.num_tokens
        else:
            tokens += part
    return tokens, media


def run(engine, requests, schedule=None, num_tokens=NUM_TOKENS, params=NO_PLACEHOLDERS, **rig):
    """Greedy tokens of requests that join one after the other."""
    made = EngineRig(engine, **rig)
    for name, (tokens, media) in requests.items():
        made.submit(name, tokens, num_tokens, params, media=media)
        for _ in range(schedule.randrange(4) if schedule is not None else 0):
            made.work()
    made.drain()
    return {name: made.tokens(name) for name in requests}, made


def array_of(part):
    tensor = part.tensors[0]
    return np.frombuffer(tensor.data, tensor.dtype).reshape(tensor.shape)


def hf_inputs(tokens, media):
    """transformers' arguments for a prompt of Gemma 4."""
    import torch

    kinds = [{IMAGE: 1, AUDIO: 3}.get(t, 0) for t in tokens] + [0] * NUM_TOKENS
    made = {"mm_token_type_ids": torch.tensor([kinds])}
    images = [p for p in media if p.kind == "image"]
    clips = [array_of(p) for p in media if p.kind == "audio"]
    if images:
        grids = [(p.grid[1], p.grid[2]) for p in images]
        cut = []
        for part, (rows, columns) in zip(images, grids, strict=True):
            values = array_of(part).astype(np.float32) / 255
            cut.append(
                values.reshape(rows, PATCH, columns, PATCH, 3).transpose(0, 2, 1, 3, 4).reshape(rows * columns, -1)
            )
        made["pixel_values"], made["image_position_ids"] = padded(cut, grids, max(r * c for r, c in grids))
    if clips:
        longest = max(map(len, clips))
        made["input_features"] = torch.zeros((len(clips), longest, 128))
        made["input_features_mask"] = torch.zeros((len(clips), longest), dtype=torch.bool)
        for i, rows in enumerate(clips):
            made["input_features"][i, : len(rows)] = torch.tensor(rows)
            made["input_features_mask"][i, : len(rows)] = True
    return made


REQUESTS = {
    "text": prompt([5, 9, 4]),
    "image": prompt([7, 8], image(16, 24, 1), [9, 10]),
    "long text": prompt(np.random.default_rng(2).integers(3, 90, 60).tolist()),
    "clip": prompt([11], clip(70), [12, 13, 14]),
    "image and clip": prompt([15, 16, 17], image(40, 32, 2), [18], clip(41), [19], image(16, 16, 3), [20] * 30),
    "the same image": prompt([7, 8], image(16, 24, 1), [21]),
    "image at the end": prompt([22] * 20, image(32, 24, 4)),
}


@pytest.mark.parametrize("spans", [None, "vision"], ids=["causal", "images see themselves"])
def test_gemma4_batches_of_all_kinds_equal_transformers(transformers, tmp_path, spans):
    """Chunks are 24 tokens, an image has 20 in the middle of a prompt and may not be cut where it sees itself."""
    reference, model = gemma4(transformers, tmp_path, text={"use_bidirectional_attention": spans})
    engine = make_engine(model, classes=CLASSES, max_width=64)
    assert engine.media.modalities == ["image", "audio"]
    assert engine.media.whole_media == (["image"] if spans else [])
    alone = {}
    for name, request in REQUESTS.items():
        alone |= run(engine, {name: request})[0]
        tokens, media = request
        assert hf.hf_agrees(reference, tokens, alone[name], PLACEHOLDERS, **hf_inputs(tokens, media)), name
    assert run(engine, REQUESTS, random.Random(3))[0] == alone
    assert engine.media.num_encoder_runs == 6, "equal content is encoded once"

    cached = make_engine(model, classes=CLASSES, max_width=64, block_size=8)
    rig = {"num_blocks": 200}
    assert run(cached, REQUESTS, **rig)[0] == alone
    again = {f"{name} again": request for name, request in REQUESTS.items()}
    both, made = run(cached, {**REQUESTS, **again}, **rig)
    assert both == alone | {f"{name} again": tokens for name, tokens in alone.items()}
    hits = {name: made.outputs[name][-1].timings.num_cached_tokens for name in both}
    assert any(hits.values()), "no prefix is found again"


def test_gemma3_images_equal_transformers(transformers, tmp_path):
    import torch

    config = transformers.Gemma3Config(
        text_config={**hf.GEMMA3, "pad_token_id": 0}, vision_config=SIGLIP, mm_tokens_per_image=16,
        image_token_id=IMAGE, boi_token_index=1, eoi_token_index=2,
    )  # fmt: skip
    config._attn_implementation = "eager"
    reference = hf.randomise(transformers.Gemma3ForConditionalGeneration(config))
    engine = make_engine(hf.save_and_load(reference, tmp_path), classes=CLASSES, max_width=64)
    pictures = [item("image", "pixels", pixels(32, 32, seed), 16) for seed in (1, 2)]
    requests = {
        "text": prompt([5, 6, 7]),
        "one": prompt([5, 6, 1], pictures[0], [2, 8]),
        "two": prompt([9] * 17, pictures[0], [10], pictures[1], [11, 12]),
    }
    got, _ = run(engine, requests, random.Random(1))
    for name, (tokens, media) in requests.items():
        more = {"token_type_ids": torch.tensor([[int(t == IMAGE) for t in tokens] + [0] * NUM_TOKENS])}
        if media:
            stacked = np.stack([array_of(p) for p in media]).transpose(0, 3, 1, 2) / 255
            more["pixel_values"] = torch.tensor((stacked - 0.5) / 0.5, dtype=torch.float32)
        assert hf.hf_agrees(reference, tokens, got[name], PLACEHOLDERS, **more), name


def test_an_image_that_no_chunk_can_hold_is_refused(transformers, tmp_path):
    _, model = gemma4(transformers, tmp_path, text={"use_bidirectional_attention": "vision"})
    rig = EngineRig(make_engine(model, classes=[160, 640], max_width=64))
    tokens, media = prompt([5], image(128, 104, 1), [6])  # 208 tokens; the rig's target takes 192 in a step
    with pytest.raises(AssertionError, match="208 tokens does not fit into a step of 192"):
        rig.submit("big", tokens, 4, GREEDY, media=media)


@pytest.mark.parametrize(
    ("first", "end", "expected"),
    [(0, 5, 5), (0, 10, 10), (0, 12, 10), (10, 12, 20), (14, 16, 20), (10, 20, 20), (10, 21, 21), (0, 30, 25)],
)
def test_chunks_end_beside_whole_items(first, end, expected):
    media = [
        MediaItem(kind="image", start=start, num_tokens=10, content_hash=b"", tensors=[]) for start in (10, 25)
    ]  # fmt: skip
    assert whole_end(media, ["image"], first, end) == expected
    assert whole_end(media, [], first, end) == end
