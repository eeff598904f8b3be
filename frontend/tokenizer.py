"""The model's tokenizer: text to ids, ids to bytes, the chat template's text and the tokens that end an output."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer

from frontend import pooling
from frontend.pooling import CheckpointPooling
from shared import gguf_file
from shared import tokenizer as vocabulary
from shared.model_files import ModelFiles
from shared.tokenizer import read_json


class ModelText(msgspec.Struct, frozen=True, kw_only=True):
    """What a model's files say about text."""

    tokenizer: Tokenizer
    chat_template: str | None
    special_texts: dict[str, str]  # "bos_token", "eos_token", ... for the template
    eos_token_ids: list[int]
    sampling_defaults: dict[str, Any]  # from generation_config.json
    pooling: CheckpointPooling | None = None  # of an embedding model


_GGUF_SAMPLING = [
    (name, f"general.sampling.{key}")
    for name, key in (("temperature", "temp"), ("top_p", "top_p"), ("top_k", "top_k"), ("min_p", "min_p"))
]


def load(files: ModelFiles) -> ModelText:
    """Tokenizer, template and defaults of a model.

    Raises:
        BadModel: they are missing or malformed.
    """
    if files.gguf is not None:
        return _from_gguf(files.gguf, files.sampling_defaults)
    assert files.folder is not None, "a model is a folder or a GGUF file"
    return _from_folder(files.folder)


def _from_gguf(path: Path, sampling_defaults: dict[str, Any]) -> ModelText:
    """A file may carry its own defaults: `general.sampling.*`, llama.cpp's keys."""
    metadata = gguf_file.read_metadata(path)
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    special: dict[str, str] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(token_id, int) and token_id < len(tokens):
            special[f"{name}_token"] = tokens[token_id]
    known = vocabulary.from_gguf(metadata)
    return ModelText(
        tokenizer=known.tokenizer,
        chat_template=metadata.get("tokenizer.chat_template"),
        special_texts=special,
        eos_token_ids=known.eos_token_ids,
        sampling_defaults=sampling_defaults | {name: metadata[key] for name, key in _GGUF_SAMPLING if key in metadata},
    )


def _from_folder(folder: Path) -> ModelText:
    tokenizer_config = read_json(folder / "tokenizer_config.json")
    generation_config = read_json(folder / "generation_config.json")
    known = vocabulary.from_folder(folder)
    return ModelText(
        tokenizer=known.tokenizer,
        chat_template=_folder_template(folder, tokenizer_config),
        special_texts=vocabulary.special_texts(tokenizer_config),
        eos_token_ids=known.eos_token_ids,
        sampling_defaults=generation_config if generation_config.get("do_sample") is not False else {},
        pooling=pooling.of_folder(folder),
    )


def _folder_template(folder: Path, tokenizer_config: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    template = read_json(folder / "chat_template.json").get("chat_template") or tokenizer_config.get("chat_template")
    if isinstance(template, list):  # named templates; the default one also takes tools where there is no other
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def encode(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
    # The call that leaves out each token's place in the text: 4.0 against 5.3 ms for 4,000 tokens.
    (found,) = tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
    ids: list[int] = found.ids
    return ids


def decode(tokenizer: Tokenizer, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
    text: str = tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
    return text
