"""Tokenizers from GGUF metadata and from folders."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from frontend import gguf_tokenizer
from frontend.sampling import for_sequences
from frontend.schemas import CompletionBody, parse
from frontend.tokenizer import ModelText, encode, load
from shared import gguf_file
from shared.errors import BadModel
from shared.model_files import ModelFiles
from tests.frontend.conftest import TOKENIZER, ids


@pytest.mark.embedded
def test_embedded_special_tokens_are_single_ids(embedded_text: ModelText) -> None:
    tokenizer = embedded_text.tokenizer
    assert encode(tokenizer, "<|im_start|>", add_special_tokens=True) == [1]
    assert encode(tokenizer, "<|im_end|>", add_special_tokens=True) == [2]
    assert 2 in embedded_text.eos_token_ids
    assert embedded_text.special_texts["bos_token"] == "<|im_start|>"


@pytest.mark.embedded
def test_embedded_splits_digits_and_keeps_words(embedded_text: ModelText) -> None:
    """SmolLM2 splits every digit from its neighbours and puts a word's space in front of it."""
    tokens = embedded_text.tokenizer.encode("The year 2024 is long").tokens
    assert tokens == ["The", "Ġyear", "Ġ", "2", "0", "2", "4", "Ġis", "Ġlong"]


@pytest.mark.embedded
@pytest.mark.parametrize(
    "text", ["", " ", "  two  spaces ", "Ünïcödé 你好 🎉", "a\n\n\tb\r\n", "x = [1, 23]; // 'quoted'", "\u00a0nbsp"]
)
def test_embedded_round_trip(text: str, embedded_text: ModelText) -> None:
    token_ids = encode(embedded_text.tokenizer, text, add_special_tokens=True)
    assert embedded_text.tokenizer.decode(token_ids, skip_special_tokens=False) == text


def byte_level_metadata(pre: str) -> dict[str, object]:
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "</s>", *alphabet, "12", "123", "ab", "Ġa"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
        "tokenizer.ggml.merges": ["1 2", "12 3", "a b", "Ġ a"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("smollm", ["1", "2", "3", "ab", "Ġa"]),  # every digit alone
        ("qwen2", ["1", "2", "3", "ab", "Ġa"]),
        ("llama-bpe", ["123", "ab", "Ġa"]),  # up to three digits together
        ("gpt-2", ["123", "ab", "Ġa"]),
    ],
)
def test_pre_tokenizers_split_as_their_models_do(pre: str, expected: list[str]) -> None:
    tokenizer = gguf_tokenizer.build(byte_level_metadata(pre))
    assert tokenizer.encode("123ab a", add_special_tokens=False).tokens == expected


def test_llama_bpe_begins_with_bos_and_smollm_does_not() -> None:
    assert gguf_tokenizer.build(byte_level_metadata("llama-bpe")).encode("a").tokens == ["<s>", "a"]
    assert gguf_tokenizer.build(byte_level_metadata("smollm")).encode("a").tokens == ["a"]


def test_sentencepiece_merges_by_score() -> None:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "c", "ab", "bc", "▁ab"]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 7,
        "tokenizer.ggml.scores": [0.0] * 259 + [-10.0, -11.0, -12.0, -13.0, -2.0, -1.0, -3.0],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    tokenizer = gguf_tokenizer.build(metadata)
    assert tokenizer.encode("abc").tokens == ["<s>", "▁", "a", "bc"]  # bc scores better than ab
    assert tokenizer.encode("ab").tokens == ["<s>", "▁ab"]
    emoji = tokenizer.encode("a👍", add_special_tokens=False)
    assert emoji.tokens[-4:] == [f"<0x{b:02X}>" for b in "👍".encode()]
    assert tokenizer.decode(emoji.ids) == "a👍"


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(BadModel, match="no-such-pre"):
        gguf_tokenizer.build(byte_level_metadata("no-such-pre"))
    with pytest.raises(BadModel, match="bert"):
        gguf_tokenizer.build({"tokenizer.ggml.model": "bert", "tokenizer.ggml.tokens": ["a"]})


def gguf_bytes() -> bytes:
    """A header, one string and one array of integers."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    pairs = text("name") + struct.pack("<I", 8) + text("x") + text("ids") + struct.pack("<IIQ3i", 9, 5, 3, 1, 2, 3)
    return struct.pack("<IIQQ", 0x46554747, 3, 0, 2) + pairs


def test_metadata_is_read_and_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    whole = gguf_bytes()
    path.write_bytes(whole)
    assert gguf_file.read_metadata(path) == {"name": "x", "ids": [1, 2, 3]}
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(BadModel):
            gguf_file.read_metadata(path)


def write_folder(folder: Path, **files: object) -> Path:
    TOKENIZER.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 0}))
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def test_folder_gives_tokenizer_template_eos_and_defaults(tmp_path: Path) -> None:
    folder = write_folder(
        tmp_path,
        tokenizer_config__json={
            "chat_template": "from config",
            "eos_token": {"content": "<|im_end|>"},
            "added_tokens_decoder": {"259": {"content": "<tool>", "special": False}},
        },
        generation_config__json={"eos_token_id": [0, 1], "temperature": 0.6, "do_sample": True},
    )
    text = load(ModelFiles(name="m", folder=folder))
    assert text.eos_token_ids == [0, 1, 2]
    assert text.chat_template == "from config"
    assert text.sampling_defaults["temperature"] == 0.6
    assert encode(text.tokenizer, "a<tool>", add_special_tokens=True) == [*ids("a"), 259]


def test_a_template_file_goes_before_the_config_and_greedy_checkpoints_give_no_defaults(tmp_path: Path) -> None:
    folder = write_folder(
        tmp_path,
        tokenizer_config__json={"chat_template": [{"name": "default", "template": "named"}]},
        generation_config__json={"temperature": 0.6, "do_sample": False},
    )
    text = load(ModelFiles(name="m", folder=folder))
    assert text.chat_template == "named"
    assert text.sampling_defaults == {}
    assert text.eos_token_ids == [0]
    (folder / "chat_template.jinja").write_text("from file")
    assert load(ModelFiles(name="m", folder=folder)).chat_template == "from file"


def test_malformed_files_are_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(BadModel, match=r"tokenizer\.json"):
        load(ModelFiles(name="m", folder=folder))
    (folder / "config.json").write_text("[")
    with pytest.raises(BadModel, match=r"config\.json"):
        load(ModelFiles(name="m", folder=folder))


def test_the_embedded_model_is_sampled_as_its_card_says_unless_a_request_says_otherwise(
    embedded_text: ModelText,
) -> None:
    body = parse(b'{"model": "default", "prompt": "x"}', CompletionBody)
    (params,) = for_sequences(body, embedded_text.sampling_defaults, 49152, None)
    assert (params.temperature, params.top_p) == (0.2, 0.9)
    body = parse(b'{"model": "default", "prompt": "x", "temperature": 1, "top_p": 1}', CompletionBody)
    (params,) = for_sequences(body, embedded_text.sampling_defaults, 49152, None)
    assert (params.temperature, params.top_p) == (1.0, 1.0)
