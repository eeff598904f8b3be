"""A `tokenizers.Tokenizer` from GGUF metadata: byte-level BPE ("gpt2") and SentencePiece ("llama") vocabularies."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from shared.errors import BadModel

# Token types of the format (llama.cpp's llama_token_type).
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2_SPLIT = _WORDS + r"\p{N}" + _REST
LLAMA3_SPLIT = _WORDS + r"\p{N}{1,3}" + _REST

# `tokenizer.ggml.pre` names the pre-tokenizer; these groups split alike.
_GPT2 = frozenset({"default", "gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jais", "roberta-bpe", "jina-v2-en"})
_DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
_QWEN2 = frozenset({"qwen2", "stablelm2", "deepseek-r1-qwen", "hunyuan", "megrez"})
_LLAMA3 = frozenset({"llama-bpe", "llama3", "llama-v3", "falcon3", "dbrx", "smaug-bpe", "pixtral", "falcon-h1"})

# Texts of tokens that end a turn; several checkpoints name only one of theirs as eos_token_id.
_END_TEXTS = frozenset({"<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>"})
_END_TEXTS |= {"<|eom_id|>", "</s>", "<eos>", "<|eot|>"}


def build(metadata: dict[str, Any]) -> Tokenizer:
    """The tokenizer that these key-value pairs describe.

    Raises:
        BadModel: a vocabulary or pre-tokenizer of a kind that is not known, or keys are missing.
    """
    kind = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise BadModel("the GGUF file holds no tokenizer")
    if kind == "gpt2":
        tokenizer = _byte_level(metadata, tokens)
    elif kind == "llama":
        tokenizer = _sentencepiece(metadata, tokens)
    else:
        raise BadModel(f"GGUF tokenizer kind {kind!r} is not supported (gpt2 and llama are)")
    _add_special_tokens(tokenizer, metadata, tokens)
    _add_bos(tokenizer, metadata, tokens)
    return tokenizer


def eos_token_ids(metadata: dict[str, Any]) -> list[int]:
    """Tokens that end the output: those named by id, and control tokens with a well-known text."""
    ids = {metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")}
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata.get("tokenizer.ggml.token_type") or []
    ids |= {i for i, kind in enumerate(types) if kind == _CONTROL and tokens[i] in _END_TEXTS}
    return sorted(i for i in ids if isinstance(i, int))


def _byte_level(metadata: dict[str, Any], tokens: list[str]) -> Tokenizer:
    pre = metadata.get("tokenizer.ggml.pre", "default")
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", [])]
    vocab = {token: i for i, token in enumerate(tokens)}
    known = [(a, b) for a, b in merges if a in vocab and b in vocab and a + b in vocab]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=known, ignore_merges=pre in _LLAMA3))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre in _GPT2 | _DIGITS)
    if pre in _GPT2:
        tokenizer.pre_tokenizer = byte_level
    elif pre in _DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    elif pre in _QWEN2 | _LLAMA3:
        pattern = Regex(QWEN2_SPLIT if pre in _QWEN2 else LLAMA3_SPLIT)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, "isolated"), byte_level])
        if pre == "qwen2":
            tokenizer.normalizer = normalizers.NFC()
    else:
        known_names = ", ".join(sorted(_GPT2 | _DIGITS | _QWEN2 | _LLAMA3))
        raise BadModel(f"GGUF pre-tokenizer {pre!r} is not known; known are {known_names}")
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: dict[str, Any], tokens: list[str]) -> Tokenizer:
    """SentencePiece BPE: merges follow from the scores, as in the conversion that Hugging Face ships.

    A piece may be made of any two pieces of the vocabulary; the pair whose result has the best score merges first.
    """
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise BadModel("the GGUF file's tokenizer has no score for every token")
    vocab = {token: i for i, token in enumerate(tokens)}
    merges: list[tuple[float, int, int, tuple[str, str]]] = []
    for piece, i in vocab.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                merges.append((-scores[i], vocab[left], vocab[right], (left, right)))
    merges.sort()
    unknown_id = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[pair for *_, pair in merges],
            unk_token=tokens[unknown_id] if 0 <= unknown_id < len(tokens) else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    has_prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    steps = [normalizers.Prepend("▁")] if has_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    ends = [decoders.Strip(content=" ", left=1, right=0)] if has_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *ends],
    )
    return tokenizer


def _add_special_tokens(tokenizer: Tokenizer, metadata: dict[str, Any], tokens: list[str]) -> None:
    types = metadata.get("tokenizer.ggml.token_type") or []
    control = [t for t, kind in zip(tokens, types, strict=False) if kind in (_CONTROL, _UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    defined = [t for t, kind in zip(tokens, types, strict=False) if kind == _USER_DEFINED]
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in defined])


def _add_bos(tokenizer: Tokenizer, metadata: dict[str, Any], tokens: list[str]) -> None:
    """Let `encode(add_special_tokens=True)` begin with the begin-of-sequence token where the model wants one."""
    is_usual = metadata["tokenizer.ggml.model"] == "llama" or metadata.get("tokenizer.ggml.pre") in _LLAMA3
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    if not metadata.get("tokenizer.ggml.add_bos_token", is_usual) or not isinstance(bos, int) or bos >= len(tokens):
        return
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[tokens[bos], "$A"], pair=[tokens[bos], "$A", "$B"], special_tokens=[(tokens[bos], bos)]
    )
