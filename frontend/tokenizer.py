"""The model's tokenizer: text to ids, ids to bytes, the chat template's text and the tokens that end an output."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one prompt at a time; two cores are shared with the model
from tokenizers import AddedToken, Tokenizer

from frontend import gguf_tokenizer
from shared import gguf_file
from shared.errors import BadModel
from shared.model_files import ModelFiles


class ModelText(msgspec.Struct, frozen=True, kw_only=True):
    """What a model's files say about text."""

    tokenizer: Tokenizer
    chat_template: str | None
    special_texts: dict[str, str]  # "bos_token", "eos_token", ... for the template
    eos_token_ids: list[int]
    sampling_defaults: dict[str, Any]  # from generation_config.json


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
    return ModelText(
        tokenizer=gguf_tokenizer.build(metadata),
        chat_template=metadata.get("tokenizer.chat_template"),
        special_texts=special,
        eos_token_ids=gguf_tokenizer.eos_token_ids(metadata),
        sampling_defaults=sampling_defaults | {name: metadata[key] for name, key in _GGUF_SAMPLING if key in metadata},
    )


def _from_folder(folder: Path) -> ModelText:
    config = _json(folder / "config.json")
    tokenizer_config = _json(folder / "tokenizer_config.json")
    generation_config = _json(folder / "generation_config.json")
    tokenizer = _folder_tokenizer(folder, tokenizer_config)
    special = {
        name: content["content"] if isinstance(content, dict) else content
        for name, content in tokenizer_config.items()
        if name.endswith("_token") and isinstance(content, dict | str)
    }
    # generation_config.json is written by whoever released the checkpoint for generating; the others are fallbacks.
    text_config = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
    for source in (generation_config, config, text_config or {}):
        eos = source.get("eos_token_id")
        if eos is not None:
            break
    ids = {i for i in (eos if isinstance(eos, list) else [eos]) if isinstance(i, int)}
    of_tokenizer = tokenizer.token_to_id(special["eos_token"]) if "eos_token" in special else None
    if of_tokenizer is not None:
        ids.add(of_tokenizer)
    return ModelText(
        tokenizer=tokenizer,
        chat_template=_folder_template(folder, tokenizer_config),
        special_texts=special,
        eos_token_ids=sorted(ids),
        sampling_defaults=generation_config if generation_config.get("do_sample") is not False else {},
    )


def _json(path: Path) -> dict[str, Any]:
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


def _folder_template(folder: Path, tokenizer_config: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    template = _json(folder / "chat_template.json").get("chat_template") or tokenizer_config.get("chat_template")
    if isinstance(template, list):  # named templates; the default one also takes tools where there is no other
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def encode(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
    return ids


def decode(tokenizer: Tokenizer, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
    text: str = tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
    return text
