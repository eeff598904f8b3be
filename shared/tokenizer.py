"""A model's tokenizer and the tokens that end its output, from its files.

The frontend turns text into ids and back, the target worker needs the same vocabulary for grammars: both must agree.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one prompt at a time; two cores are shared with the model
from tokenizers import AddedToken, Tokenizer

from shared import gguf_file, gguf_tokenizer
from shared.errors import BadModel
from shared.model_files import ModelFiles


class Vocabulary(msgspec.Struct, frozen=True, kw_only=True):
    """Text to ids and back, and the ids that end an output."""

    tokenizer: Tokenizer
    eos_token_ids: list[int]


def load(files: ModelFiles) -> Vocabulary:
    """Raises BadModel: the tokenizer is missing or malformed."""
    if files.gguf is not None:
        return from_gguf(gguf_file.read_metadata(files.gguf))
    assert files.folder is not None, "a model is a folder or a GGUF file"
    return from_folder(files.folder)


def from_gguf(metadata: dict[str, Any]) -> Vocabulary:
    return Vocabulary(tokenizer=gguf_tokenizer.build(metadata), eos_token_ids=gguf_tokenizer.eos_token_ids(metadata))


def from_folder(folder: Path) -> Vocabulary:
    config = read_json(folder / "config.json")
    tokenizer_config = read_json(folder / "tokenizer_config.json")
    tokenizer = _folder_tokenizer(folder, tokenizer_config)
    # generation_config.json is written by whoever released the checkpoint for generating; the others are fallbacks.
    text_config = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
    for source in (read_json(folder / "generation_config.json"), config, text_config or {}):
        eos = source.get("eos_token_id")
        if eos is not None:
            break
    ids = {i for i in (eos if isinstance(eos, list) else [eos]) if isinstance(i, int)}
    eos_text = special_texts(tokenizer_config).get("eos_token")
    of_tokenizer = tokenizer.token_to_id(eos_text) if eos_text is not None else None
    if of_tokenizer is not None:
        ids.add(of_tokenizer)
    return Vocabulary(tokenizer=tokenizer, eos_token_ids=sorted(ids))


def special_texts(tokenizer_config: dict[str, Any]) -> dict[str, str]:
    """ "bos_token", "eos_token", ... with their texts."""
    return {
        name: content["content"] if isinstance(content, dict) else content
        for name, content in tokenizer_config.items()
        if name.endswith("_token") and isinstance(content, dict | str)
    }


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no file."""
    try:
        content = msgspec.json.decode(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadModel(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise BadModel(f"{path} holds no JSON object")
    return content


def _folder_tokenizer(folder: Path, tokenizer_config: dict[str, Any]) -> Tokenizer:
    """From tokenizer.json directly, which takes a fraction of importing transformers; else by AutoTokenizer."""
    path = folder / "tokenizer.json"
    if not path.exists():
        return _converted_tokenizer(folder)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:
        raise BadModel(f"cannot read {path}: {error}") from error
    tokenizer.no_truncation()  # some checkpoints ship training-time settings
    tokenizer.no_padding()
    missing: list[AddedToken] = []
    for text_id, added in sorted(tokenizer_config.get("added_tokens_decoder", {}).items(), key=lambda p: int(p[0])):
        if tokenizer.id_to_token(int(text_id)) is None:
            flags = {k: added[k] for k in ("single_word", "lstrip", "rstrip", "normalized", "special") if k in added}
            missing.append(AddedToken(added["content"], **flags))
    tokenizer.add_tokens(missing)
    return tokenizer


def _converted_tokenizer(folder: Path) -> Tokenizer:
    """Checkpoints with tokenizer.model or tiktoken files only: transformers knows how to convert them."""
    from transformers import AutoTokenizer

    try:
        slow_or_fast = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:
        raise BadModel(f"{folder} holds no tokenizer that transformers can load: {error}") from error
    tokenizer = getattr(slow_or_fast, "backend_tokenizer", None)
    if not isinstance(tokenizer, Tokenizer):
        raise BadModel(f"the tokenizer in {folder} has no fast form (tokenizer.json)")
    return tokenizer
