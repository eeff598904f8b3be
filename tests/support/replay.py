"""Plays draft/verify rounds over documents that the embedded model wrote greedily.

The target is teacher-forced: one forward pass over a document gives every hidden row, and a draft is accepted where it
equals the document. `python -m tests.support.replay [documents] [drafter ...]` prints the figures.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared import config
from workers import blas

if not {"mlx.core", "torch"} & set(sys.modules):  # in a process of its own; otherwise MLX has its own BLAS already
    blas.prepare(config.load())

import mlx.core as mx
from mlx_lm.models import llama

from workers.drafters.base import Drafter
from workers.drafters.checkpoint import detect
from workers.drafters.registry import load_drafter, load_fusion, tables

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("DRAFTERS_FOLDER", REPOSITORY.parent / "shared" / "drafters-smollm2"))
NUM_TOKENS = {"dflash-2l": 7, "dflash-4l": 7, "eagle3": 4, "mtp": 2}
NUM_DOCUMENTS = int(os.environ.get("DRAFTERS_DOCUMENTS", "4"))
TOLERANCE = 0.015 if NUM_DOCUMENTS >= 20 else 0.03  # of a mean over so many documents
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_FILE = config.load().cache_folder / "models" / GGUF

NEEDS_REFERENCES = [
    pytest.mark.embedded,
    pytest.mark.timeout(1200),
    pytest.mark.skipif("DRAFTERS_DOCUMENTS" not in os.environ, reason="takes minutes: make test-drafters"),
    pytest.mark.skipif(not (FOLDER / "held_out.json").exists(), reason="no reference drafters"),
    pytest.mark.skipif(not MODEL_FILE.exists(), reason="the embedded model was not fetched yet"),
]

GGUF_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


class Target:
    """The embedded model in float32, from its GGUF file."""

    def __init__(self, gguf: Path) -> None:
        arrays, metadata = mx.load(str(gguf), return_metadata=True)

        def number(key: str) -> float:
            return metadata["llama." + key].item()

        self.model = llama.Model(
            llama.ModelArgs(
                model_type="llama",
                hidden_size=int(number("embedding_length")),
                num_hidden_layers=int(number("block_count")),
                intermediate_size=int(number("feed_forward_length")),
                num_attention_heads=int(number("attention.head_count")),
                num_key_value_heads=int(number("attention.head_count_kv")),
                rms_norm_eps=float(number("attention.layer_norm_rms_epsilon")),
                vocab_size=int(number("vocab_size")),
                rope_theta=float(number("rope.freq_base")),
                rope_traditional=True,  # GGUF stores q and k rows for interleaved pairs
                tie_word_embeddings=True,
            )
        )
        weights: dict[str, mx.array] = {}
        for name in [n for n in arrays if n.endswith(".weight")]:
            array, stem = arrays[name], name.removesuffix(".weight")
            if stem + ".scales" in arrays:
                scales = arrays[stem + ".scales"].astype(mx.float32)
                biases = arrays[stem + ".biases"].astype(mx.float32)
                array = mx.dequantize(array, scales, biases, 32, array.shape[-1] * 32 // (scales.shape[-1] * 32))
            weights[_module_name(stem) + ".weight"] = array.astype(mx.float32)
        self.model.load_weights(list(weights.items()))
        mx.eval(self.model.parameters())
        self.embedding: mx.array = self.model.model.embed_tokens.weight

    def hidden(self, token_ids: Sequence[int], taps: Sequence[int]) -> tuple[list[mx.array], mx.array]:
        """(rows after each tapped block, rows after the final norm), each (N, H)."""
        inner = self.model.model
        h = inner.embed_tokens(mx.array([list(token_ids)]))
        captured: dict[int, mx.array] = {}
        for index, layer in enumerate(inner.layers):
            h = layer(h, "causal")
            captured[index] = h[0]
        return [captured[tap] for tap in taps], inner.norm(h)[0]


def _module_name(stem: str) -> str:
    if stem == "token_embd":
        return "model.embed_tokens"
    if stem == "output_norm":
        return "model.norm"
    _, index, part = stem.split(".")
    return f"model.layers.{index}.{GGUF_NAMES[part]}"


def load_documents(count: int) -> list[dict[str, Any]]:
    return json.loads((FOLDER / "held_out.json").read_text())["documents"][:count]


def unsafe_positions(target: Target, document: dict[str, Any], margin: float) -> set[int]:
    """Positions of the answer whose token is not the float32 target's greedy one, or leads by less than `margin` nats.

    The documents were written in bfloat16, where near ties fall differently.
    """
    ids, first = document["token_ids"], document["num_prompt_tokens"]
    _, rows = target.hidden(ids, [])
    logits = np.array(rows[first - 1 : -1] @ target.embedding.T)
    own = logits[np.arange(len(logits)), ids[first:]]
    logits[np.arange(len(logits)), ids[first:]] = -np.inf
    return {first + int(i) for i in np.nonzero(own - logits.max(axis=1) < margin)[0]}


def features_of(name: str, target: Target, documents: Sequence[dict[str, Any]], tap_shift: int = 0) -> list[mx.array]:
    """The fused rows (N, H) of every document, as the target process would send them."""
    config = detect(FOLDER / name)
    fusion = load_fusion(config, mx.float32)
    assert fusion is not None
    rows = []
    for document in documents:
        taps, final = target.hidden(document["token_ids"], [t + tap_shift for t in config.taps])
        rows.append(fusion(taps if config.feature == "taps" else [final]))
        mx.eval(rows[-1])
    return rows


def load(name: str, target: Target) -> Drafter:
    return load_drafter(detect(FOLDER / name), mx.float32, *tables(target.embedding))


def play(
    drafter: Drafter,
    documents: Sequence[dict[str, Any]],
    features: Sequence[mx.array],
    num_tokens: int,
    follow: Sequence[Sequence[int]] | None = None,
) -> list[list[int]]:
    """Tokens committed in each round of each document, all documents drafted as one batch of unequal lengths.

    With `follow` the next anchor comes from those rounds, so that one different round does not change the later ones.
    """
    states = [drafter.new_state() for _ in documents]
    rounds: list[list[int]] = [[] for _ in documents]
    running = list(range(len(documents)))
    anchors = [d["num_prompt_tokens"] for d in documents]
    while running:
        batch = [states[i] for i in running]
        ids = [documents[i]["token_ids"] for i in running]
        known = [s.length for s in batch]
        ends = [anchors[i] for i in running]
        drafter.extend(
            batch,
            [features[i][a:b] for i, a, b in zip(running, known, ends, strict=True)],
            [t[a:b] for t, a, b in zip(ids, known, ends, strict=True)],
        )
        drafts = drafter.draft(batch, [t[p] for t, p in zip(ids, ends, strict=True)], num_tokens)
        proposed = np.array(drafts.token_ids).tolist()
        for i, tokens, draft, p in zip(running, ids, proposed, ends, strict=True):
            truth = tokens[p + 1 :]
            num_accepted = 0
            while num_accepted < min(len(truth), num_tokens) and draft[num_accepted] == truth[num_accepted]:
                num_accepted += 1
            committed = min(num_accepted + 1, len(truth))
            anchors[i] = p + (committed if follow is None else follow[i][len(rounds[i])])
            rounds[i].append(committed)
        running = [i for i in running if anchors[i] < len(documents[i]["token_ids"]) - 1]
    return rounds


def mean_acceptance_length(rounds: Sequence[Sequence[int]]) -> float:
    """Mean over documents of tokens per round."""
    return float(np.mean([np.mean(r) for r in rounds]))


def num_equal_documents(rounds: Sequence[list[int]], documents: Sequence[dict[str, Any]], name: str) -> int:
    return sum(r == d["committed_per_round"][name] for r, d in zip(rounds, documents, strict=True))


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    target = Target(MODEL_FILE)
    documents = load_documents(count)
    for name in sys.argv[2:] or NUM_TOKENS:
        rounds = play(load(name, target), documents, features_of(name, target, documents), NUM_TOKENS[name])
        expected = [d["committed_per_round"][name] for d in documents]
        print(
            f"{name}: mean {mean_acceptance_length(rounds):.4f}, expected {mean_acceptance_length(expected):.4f}; "
            f"{num_equal_documents(rounds, documents, name)} of {len(documents)} documents equal round by round",
            flush=True,
        )


if __name__ == "__main__":
    main()
