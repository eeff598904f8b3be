"""Which cache layout a model gets: blocks where a kernel attends to them in every layer, slots otherwise."""

from __future__ import annotations

import os

os.environ.setdefault("MLX_DISABLE_COMPILE", "1")

from pathlib import Path

import mlx.core as mx
import pytest

from shared.config import Settings
from tests.support.engine_rig import decoder_target, mlx_lm_target
from workers import choose_attention
from workers.build import make_engine
from workers.cache.paged import PagedStore
from workers.kernels import prove as proving
from workers.kernels import select as selecting
from workers.kernels.base import Variant
from workers.kernels.pages import RING, Pages, Pool
from workers.kernels.reference import ReferenceAttention
from workers.load import LoadedModel
from workers.models.base import TextModel

pytestmark = pytest.mark.mlx


class OffInBlocks(ReferenceAttention):
    def attend(self, q: mx.array, k: mx.array, v: mx.array, pool: Pool, pages: Pages, variant: Variant) -> mx.array:
        return super().attend(q, k, v, pool, pages, variant) + (0.0 if pages.shift == RING else 1.0)


def loaded(model: TextModel) -> LoadedModel:
    return LoadedModel(
        model=model, config={}, name="m", architecture="m", fingerprint="m", eos_token_ids=[], max_model_len=256,
        vocab_size=model.vocab_size, dtype="float32",
    )  # fmt: skip


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """As if the reference were a CUDA kernel, faster than stock."""

    def make(attention: type[ReferenceAttention]) -> Path:
        monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
        monkeypatch.setattr(selecting, "machine_kernel", attention)
        monkeypatch.setattr(selecting, "supports", lambda *shape: True)  # heads of 8 have no kernel
        monkeypatch.setattr(proving, "seconds", lambda attention, shape, **_: 1e-6 if attention is not None else 2e-6)
        return tmp_path / attention.__name__

    return make


@pytest.mark.parametrize(("attention", "layout"), [(ReferenceAttention, "paged"), (OffInBlocks, "slots")])
def test_blocks_are_taken_where_a_kernel_serves_every_layer_in_them(machine, attention, layout) -> None:
    settings = Settings(cache_dir=str(machine(attention)), max_num_seqs=2)
    chosen = choose_attention.choose(loaded(decoder_target()), settings)
    assert chosen.layout == layout
    assert chosen.attention is not None
    assert all(chosen.attention.is_used.values()), "in slots both are right"
    engine, info = make_engine(loaded(decoder_target()), settings)
    assert isinstance(engine.store, PagedStore) == (layout == "paged")
    assert (info.attention[0] == "keys and values in blocks that prefixes share") == (layout == "paged")
    assert info.prefix_cache is not None
    assert info.prefix_cache.is_shared == (layout == "paged")


@pytest.mark.parametrize("name", ["sliding windows", "recurrent states", "another's attention", "stock", "slots"])
def test_slots_are_taken_otherwise(machine, name) -> None:
    models = {
        "sliding windows": lambda: decoder_target(window=16),
        "recurrent states": lambda: mlx_lm_target("lfm2"),
        "another's attention": lambda: mlx_lm_target("llama"),
    }
    settings = Settings(
        cache_dir=str(machine(ReferenceAttention)),
        attention="stock" if name == "stock" else "auto",
        kv_layout="slots" if name == "slots" else "auto",
    )
    assert choose_attention.choose(loaded(models.get(name, decoder_target)()), settings).layout == "slots"


def test_a_machine_without_cuda_has_slots(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(cache_dir=str(machine(ReferenceAttention)))
    monkeypatch.setattr(mx.cuda, "is_available", lambda: False)
    assert choose_attention.choose(loaded(decoder_target()), settings).layout == "slots"
