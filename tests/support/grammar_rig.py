"""The engine rig with a model whose tokens are bytes, so that tests can write grammars and read outputs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from shared.grammar import Compiler
from shared.messages import Grammar, SamplingParams, Thinking
from tests.support.engine_rig import Drafts, EngineRig, decoder_target, make_engine
from workers.engine import Engine

EOS = 0
THINK, THINK_END = 1, 2
NUM_SPECIAL = 3
# What a random model would never write as bytes: pieces of JSON, so that tokens hold several characters.
PIECES = ['{"', '":', '",', '":"', "true", "false", "null", "10", "ab", "  ", '"}', "],"]


@lru_cache
def tokenizer() -> Tokenizer:
    """Ids 0..2 are special, then 256 bytes, then PIECES."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|end|>", "<think>", "</think>"]
    vocab = {token: i for i, token in enumerate([*specials, *alphabet])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(text, special=True) for text in specials])
    made.add_tokens([AddedToken(piece, special=False, normalized=False) for piece in PIECES])
    return made


def vocab_size() -> int:
    return int(tokenizer().get_vocab_size(with_added_tokens=True)) + 5  # as padded embeddings are


@lru_cache
def compiler() -> Compiler:
    return Compiler(tokenizer(), [EOS], vocab_size())


@lru_cache
def engine(classes: tuple[int, ...] = (256, 1024), seed: int = 0) -> Engine:
    made = make_engine(decoder_target(2, vocab_size=vocab_size(), seed=seed), num_slots=16, classes=classes)
    made.grammars = compiler()
    return made


def ids(text: str) -> list[int]:
    encoded: list[int] = tokenizer().encode(text, add_special_tokens=False).ids
    return encoded


def text_of(token_ids: Sequence[int]) -> str:
    decoded: str = tokenizer().decode([t for t in token_ids if t != EOS], skip_special_tokens=False)
    return decoded


def thinking(*, is_open: bool, budget: int | None = None) -> Thinking:
    return Thinking(
        start="" if is_open else "<think>",
        end="</think>",
        start_token_ids=[] if is_open else [THINK],
        end_token_ids=[THINK_END],
        budget=budget,
    )


class GrammarRig(EngineRig):
    """Runs requests that each have a grammar of their own."""

    PROMPT = (65, 66, 67)

    def __init__(
        self, drafter: Drafts | None = None, k: int | None = None, running: Engine | None = None, **changes: object
    ) -> None:
        super().__init__(running or engine(), drafter, k, **changes)  # type: ignore[arg-type]  # settings by name

    def ask(
        self,
        name: str,
        grammar: Grammar | None,
        max_tokens: int,
        sampling: SamplingParams,
        prompt: Sequence[int] = PROMPT,
        **more: object,
    ) -> None:
        self.submit(name, list(prompt), max_tokens, sampling, grammar=grammar, stop_token_ids=[EOS], **more)

    def text(self, name: str) -> str:
        return text_of(self.tokens(name))

    def reason(self, name: str) -> str | None:
        return self.outputs[name][-1].finish_reason
