"""Gemma 3n's encoders and the text decoder around them, against transformers and, for images, timm."""

from __future__ import annotations

import json
import random

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model
from safetensors.numpy import load_file, save_file

from frontend.media.processors import processor_of
from shared.errors import BadModel
from shared.messages import SamplingParams
from shared.model_files import ModelFiles
from tandem.convert import convert
from tests.support.cached_logits import cached_logits
from tests.support.engine_rig import make_engine
from tests.support.timm_oracle import import_timm
from tests.workers.gemma import hf
from tests.workers.gemma.test_serving import array_of, item, pixels, prompt, run
from workers.load import load
from workers.models.gemma.gemma3n import Gemma3nConfig
from workers.models.gemma.mobilenet import MobileNet, MobileNetConfig

pytestmark = [pytest.mark.mlx, pytest.mark.oracle]

TEXT_VOCAB, EOI, IMAGE, EOA, AUDIO, LAST = 88, 88, 89, 92, 93, 95  # four tokens of each embedder behind the text's
CLIP_TOKENS = 12
PLACEHOLDERS = tuple(range(TEXT_VOCAB, hf.VOCAB))
NO_PLACEHOLDERS = SamplingParams(temperature=0.0, logit_bias=dict.fromkeys(PLACEHOLDERS, -100.0))
CLASSES = [48, 160]
MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
TEXT = {
    "vocab_size": hf.VOCAB, "vocab_size_per_layer_input": TEXT_VOCAB, "hidden_size": 64, "intermediate_size": [48] * 5,
    "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0,
    "hidden_size_per_layer_input": 8, "sliding_window": hf.WINDOW, "num_kv_shared_layers": 2, "laurel_rank": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
    "activation_sparsity_pattern": [0.9, 0.5, 0.0, 0.0, 0.0], "altup_num_inputs": 3, "final_logit_softcapping": 30.0,
    "max_position_embeddings": 512,
}  # fmt: skip
AUDIO_TOWER = {
    "hidden_size": 32, "vocab_size": 4, "vocab_offset": EOA, "input_feat_size": 20, "conf_num_attention_heads": 4,
    "conf_num_hidden_layers": 2, "sscp_conv_channel_size": (8, 4),
}  # fmt: skip
CASES = {
    "as released": {},
    "other windows": {
        "conf_attention_chunk_size": 5, "conf_attention_context_left": 8, "conf_attention_context_right": 3,
        "conf_reduction_factor": 2,
    },
    "other convolutions": {
        "sscp_conv_kernel_size": ((5, 3), (3, 5)), "sscp_conv_stride_size": ((3, 2), (2, 1)),
        "conf_reduction_factor": 1,
    },
}  # fmt: skip


def make_vision_by(monkeypatch, make):
    """transformers leaves images to timm, and takes that only where torchvision is too."""
    from transformers.models.gemma3n import modeling_gemma3n

    original = modeling_gemma3n.AutoModel

    def from_config(config, **options):
        return make(config) if config.model_type == "gemma3n_vision" else original.from_config(config, **options)

    stand_in = type("AutoModel", (), {"from_config": staticmethod(from_config)})
    monkeypatch.setattr(modeling_gemma3n, "AutoModel", stand_in)


@pytest.fixture
def without_vision(transformers, monkeypatch):
    import torch

    make_vision_by(monkeypatch, lambda config: torch.nn.Module())


@pytest.fixture
def timm(transformers, monkeypatch):
    """As transformers' wrapper calls it."""
    if not import_timm():
        pytest.skip("timm is not installed")
    import timm
    import torch
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    class Wrapper(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            self.timm_model = timm.create_model(
                config.architecture, pretrained=False, num_classes=0, **config.model_args
            )

        def forward(self, pixel_values, do_pooling, return_dict):
            assert not do_pooling and return_dict
            return BaseModelOutputWithPooling(last_hidden_state=self.timm_model.forward_features(pixel_values))

    make_vision_by(monkeypatch, Wrapper)


VISION = {
    "hidden_size": 2048, "vocab_size": 4, "vocab_offset": EOI,
    "model_args": {"channel_multiplier": 0.0625, "msfa_output_resolution": 2},
}  # fmt: skip


def gemma3n(transformers, folder, audio=None, num_tokens=CLIP_TOKENS):
    config = transformers.Gemma3nConfig(
        text_config=TEXT, vision_config=VISION, audio_config={**AUDIO_TOWER, **(audio or {})},
        audio_soft_tokens_per_image=num_tokens, vision_soft_tokens_per_image=4, image_token_id=IMAGE,
        audio_token_id=AUDIO, boi_token_id=1, eoi_token_id=EOI, boa_token_id=3, eoa_token_id=EOA,
    )  # fmt: skip
    config._attn_implementation = "eager"
    reference = hf.randomise(transformers.Gemma3nForConditionalGeneration(config))
    return reference, hf.save_and_load(reference, folder)


def frames(count):
    return np.random.default_rng(count).standard_normal((count, 20)).astype(np.float32)


def clip(count):
    return item("audio", "frames", frames(count), CLIP_TOKENS)


def place(*parts):
    """As `prompt`, with this model's placeholders."""
    tokens, media = prompt(*parts)
    for part in media:
        placeholder = {"audio": AUDIO, "image": IMAGE}[part.kind]
        tokens[part.start : part.start + part.num_tokens] = [placeholder] * part.num_tokens
    return tokens, media


def hf_inputs(media):
    """transformers' arguments; it reads silence behind the shorter clips of a batch, so they have one length here."""
    import torch

    made = {}
    if clips := [array_of(part) for part in media if part.kind == "audio"]:
        stacked = torch.tensor(np.stack(clips))
        made |= {"input_features": stacked, "input_features_mask": torch.ones(stacked.shape[:2], dtype=torch.bool)}
    if images := [normalised(array_of(part)) for part in media if part.kind == "image"]:
        made["pixel_values"] = torch.tensor(np.stack(images).transpose(0, 3, 1, 2))
    return made


def normalised(pixels):
    return (pixels.astype(np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)


def image(size, seed):
    """With the settings that travel beside its pixels."""
    made = item("image", "pixels", pixels(size, size, seed), 4, [1, 1, 1])
    for name, values in (("mean", MEAN), ("std", STD)):
        made.tensors.append(item("image", name, np.array(values, np.float32), 0).tensors[0])
    return made


@pytest.mark.usefixtures("without_vision")
@pytest.mark.parametrize("case", CASES)
def test_features_equal_transformers(transformers, tmp_path, case):
    import torch

    reference, model = gemma3n(transformers, tmp_path, CASES[case], num_tokens=48)
    for count in (1, 3, 47, 131):
        heard = torch.tensor(frames(count)[None])
        with torch.no_grad():
            expected = reference.model.get_audio_features(
                heard, torch.zeros(heard.shape[:2], dtype=torch.bool), return_dict=True
            ).pooler_output[0]
            filler = reference.model.embed_audio(input_ids=torch.tensor([LAST]))
        got = np.array(model.encode_audio(mx.array(frames(count))))
        assert got.shape == (48, 64)
        assert 0 < len(expected) < 48
        np.testing.assert_allclose(got[: len(expected)], expected.numpy(), rtol=0, atol=1e-4)
        np.testing.assert_allclose(got[len(expected) :], filler.expand(48 - len(expected), -1), rtol=0, atol=1e-4)


def logits_with(model, tokens, media):
    embeddings = model.embed(mx.array([tokens]))
    for part in media:
        tensors = {
            t.name: mx.array(np.frombuffer(t.data, t.dtype).reshape(t.shape)) for t in part.tensors
        }  # fmt: skip
        rows = model.encode_media(tensors, part.grid, part.kind)[0]
        embeddings[0, part.start : part.start + part.num_tokens] = rows
    return np.array(model(mx.array([tokens]), input_embeddings=embeddings))


REQUESTS = {
    "text": place([5, 9, 4]),
    "clip": place([11, 3], clip(70), [EOA, 12, 13, 14]),
    "two clips": place([15, 16, 3], clip(41), [EOA, 18, 3], clip(41), [EOA, *range(20, 50)]),
    "the same clip": place([7, 3], clip(70), [EOA, 21]),
}


@pytest.mark.usefixtures("without_vision")
def test_logits_and_batches_equal_transformers(transformers, tmp_path):
    """One by one and together, in chunks, joining at random: greedy tokens; logits of whole prompts."""
    reference, model = gemma3n(transformers, tmp_path)
    engine = make_engine(model, classes=CLASSES, max_width=64)
    assert engine.media.modalities == ["audio"]
    alone = {}
    for name, (tokens, media) in REQUESTS.items():
        alone |= run(engine, {name: (tokens, media)}, num_tokens=32, params=NO_PLACEHOLDERS)[0]
        assert len(alone[name]) == 32
        assert hf.hf_agrees(reference, tokens, alone[name], PLACEHOLDERS, **hf_inputs(media)), name
        got = logits_with(model, tokens, media)
        np.testing.assert_allclose(got, hf.hf_logits(reference, [tokens], **hf_inputs(media)), rtol=0, atol=1e-4)
    assert run(engine, REQUESTS, random.Random(3), num_tokens=32, params=NO_PLACEHOLDERS)[0] == alone
    assert engine.media.num_encoder_runs == 2, "equal content is encoded once"
    cached = make_engine(model, classes=CLASSES, max_width=64, block_size=8)
    again = {f"{name} again": request for name, request in REQUESTS.items()}
    both, made = run(cached, {**REQUESTS, **again}, num_tokens=32, params=NO_PLACEHOLDERS, num_blocks=200)
    assert both == alone | {f"{name} again": tokens for name, tokens in alone.items()}
    assert any(made.outputs[name][-1].timings.num_cached_tokens for name in again)


IMAGE_REQUESTS = {
    "text": place([5, 9, 4]),
    "image": place([7, 8, 1], image(96, 1), [EOI, 9, 10]),
    "images and a clip": place(
        [15, 1], image(96, 2), [EOI, 16, 3], clip(41), [EOA, 1], image(96, 3), [EOI, *range(40)]
    ),
    "the same image": place([6, 1], image(96, 1), [EOI]),
}


@pytest.mark.usefixtures("timm")
@pytest.mark.parametrize("size", [32, 96, 160])
def test_image_features_equal_transformers(transformers, tmp_path, size):
    """Places by token: 1, 9 and 25; at 160 pixels sides are odd on the way, and paddings uneven."""
    import torch

    reference, model = gemma3n(transformers, tmp_path)
    seen = normalised(np.stack([pixels(size, size, seed) for seed in (1, 2)]))
    with torch.no_grad():
        features = reference.model.get_image_features(torch.tensor(seen.transpose(0, 3, 1, 2)), return_dict=True)
    for one, wanted in zip(seen, features.pooler_output, strict=True):
        got = np.array(model.encode_image(mx.array(one)))
        assert got.shape == (4, 64)
        np.testing.assert_allclose(got, wanted.numpy(), rtol=0, atol=1e-4)


@pytest.mark.usefixtures("timm")
def test_the_released_size_has_the_parameters_of_timm():
    import timm
    import torch

    with torch.device("meta"):
        reference = timm.create_model("mobilenetv5_300m_enc", pretrained=False, num_classes=0)
    expected = {
        name: tuple(p.permute(0, 2, 3, 1).shape if p.ndim == 4 else p.shape)
        for name, p in reference.state_dict().items()
    }
    ours = tree_flatten(MobileNet(MobileNetConfig.from_hf({}, 256)).parameters())  # lazy: nothing is allocated
    assert {name: array.shape for name, array in ours} == expected


@pytest.mark.usefixtures("timm")
def test_batches_with_images_equal_transformers(transformers, tmp_path):
    reference, model = gemma3n(transformers, tmp_path)
    engine = make_engine(model, classes=CLASSES, max_width=64)
    assert engine.media.modalities == ["image", "audio"]
    alone = {}
    for name, (tokens, media) in IMAGE_REQUESTS.items():
        alone |= run(engine, {name: (tokens, media)}, num_tokens=32, params=NO_PLACEHOLDERS)[0]
        assert len(alone[name]) == 32
        assert hf.hf_agrees(reference, tokens, alone[name], PLACEHOLDERS, **hf_inputs(media)), name
        got = logits_with(model, tokens, media)
        np.testing.assert_allclose(got, hf.hf_logits(reference, [tokens], **hf_inputs(media)), rtol=0, atol=1e-4)
    assert run(engine, IMAGE_REQUESTS, random.Random(3), num_tokens=32, params=NO_PLACEHOLDERS)[0] == alone
    assert engine.media.num_encoder_runs == 4, "equal content is encoded once"


@pytest.mark.usefixtures("timm")
def test_converted_checkpoints_see_as_their_source(transformers, tmp_path):
    """And those with channels last and names without `model.`."""
    _, model = gemma3n(transformers, tmp_path / "original")
    convert(str(tmp_path / "original"), tmp_path / "packed", bits=8, group_size=32)
    (tmp_path / "mlx").mkdir()
    weights = load_file(tmp_path / "original" / "model.safetensors")
    renamed = {
        n.removeprefix("model."): np.ascontiguousarray(np.moveaxis(w, 1, -1)) if w.ndim in (3, 4) else w
        for n, w in weights.items()
    }
    save_file(renamed, tmp_path / "mlx" / "model.safetensors", {"format": "mlx"})
    (tmp_path / "mlx" / "config.json").write_text((tmp_path / "original" / "config.json").read_text())
    seen = mx.array(normalised(pixels(96, 96, 1)))
    for folder in ("packed", "mlx"):
        other = load(ModelFiles(name="m", folder=tmp_path / folder), "float32").model
        assert other.modalities == ["image", "audio"]
        np.testing.assert_array_equal(np.array(other.encode_image(seen)), np.array(model.encode_image(seen)))


@pytest.mark.usefixtures("without_vision")
def test_tokens_of_the_audio_embedder_are_embedded_there_in_texts_too(transformers, tmp_path):
    reference, model = gemma3n(transformers, tmp_path)
    tokens = np.random.default_rng(1).integers(3, TEXT_VOCAB, (2, 30))
    tokens[:, [2, 9, 17, 29]] = [[EOA, LAST, 94, EOA], [94, EOA, LAST, LAST]]
    expected = hf.hf_logits(reference, tokens)
    np.testing.assert_allclose(cached_logits(model, tokens), expected, rtol=0, atol=1e-4)


def as_older(folder):
    """Projections that nothing reads, bases of the rotation by their own names."""
    weights = load_file(folder / "model.safetensors")
    for layer in (3, 4):
        for name in ("k_proj.weight", "v_proj.weight", "k_norm.weight"):
            of = "model.language_model.layers.{}.self_attn." + name
            weights[of.format(layer)] = np.zeros_like(weights[of.format(0)])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    ropes = config["text_config"].pop("rope_parameters")
    config["text_config"]["rope_theta"] = ropes["full_attention"]["rope_theta"]
    config["text_config"]["rope_local_base_freq"] = ropes["sliding_attention"]["rope_theta"]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.usefixtures("without_vision")
def test_converted_checkpoints_hear_as_their_source(transformers, tmp_path):
    """Ours reads both; mlx-lm reads the text of what comes of an older checkpoint."""
    _, model = gemma3n(transformers, tmp_path / "original")
    as_older(tmp_path / "original")
    done = convert(str(tmp_path / "original"), tmp_path / "cast", dtype="float32")
    assert done.num_encoder_tensors > 40
    assert not done.is_text_only
    convert(str(tmp_path / "original"), tmp_path / "packed", bits=8, group_size=32)
    expected = np.array(model.encode_audio(mx.array(frames(47))))
    tokens = mx.array([[5, 6, 7, 8]])
    for folder, atol in (("cast", 1e-5), ("packed", 0.2)):
        other = load(ModelFiles(name="m", folder=tmp_path / folder), "float32").model
        np.testing.assert_array_equal(np.array(other.encode_audio(mx.array(frames(47)))), expected)
        np.testing.assert_allclose(np.array(other(tokens)), np.array(model(tokens)), rtol=0, atol=atol)
    theirs, _ = load_model(tmp_path / "cast")
    np.testing.assert_allclose(
        np.array(theirs(tokens, cache=theirs.make_cache())), np.array(model(tokens)), rtol=0, atol=1e-4
    )
    names = set(load_file(tmp_path / "original" / "model.safetensors"))
    assert names - set(load_file(tmp_path / "cast" / "model.safetensors")) <= {
        n for n in names if "embed_vision" in n or "lm_head" in n
    }  # fmt: skip


@pytest.mark.usefixtures("without_vision")
def test_weights_under_the_names_and_layouts_of_mlx(transformers, tmp_path):
    """Channels last, `model.` left out; without encoders the text is served alone."""
    _, model = gemma3n(transformers, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    renamed = {}
    for name, array in weights.items():
        is_convolution = "conv" in name and array.ndim in (3, 4)
        renamed[name.removeprefix("model.")] = (
            np.ascontiguousarray(np.moveaxis(array, 1, -1)) if is_convolution else array
        )
    save_file(renamed, tmp_path / "model.safetensors", {"format": "mlx"})
    other = load(ModelFiles(name="m", folder=tmp_path), "float32").model
    np.testing.assert_array_equal(
        np.array(other.encode_audio(mx.array(frames(47)))), np.array(model.encode_audio(mx.array(frames(47))))
    )
    save_file(
        {n: a for n, a in renamed.items() if n.startswith("language_model.")}, tmp_path / "model.safetensors",
        {"format": "mlx"},
    )  # fmt: skip
    text = load(ModelFiles(name="m", folder=tmp_path), "float32").model
    assert text.modalities == []
    tokens = mx.array([[5, 6, 7, 8]])
    np.testing.assert_array_equal(np.array(text(tokens)), np.array(model(tokens)))


@pytest.mark.usefixtures("without_vision")
def test_the_processor_prepares_what_the_model_takes(transformers, tmp_path):
    import io

    import soundfile

    _, model = gemma3n(transformers, tmp_path, {"input_feat_size": 128}, num_tokens=188)
    processor = processor_of(tmp_path)
    assert processor.modalities == ("image", "audio")
    for seconds in (0.1, 29.99):
        samples = np.random.default_rng(0).standard_normal(int(seconds * 16_000)).astype(np.float32) * 0.1
        file = io.BytesIO()
        soundfile.write(file, samples, 16_000, format="WAV")
        processed = processor.audio(file.getvalue(), "x")
        arrays = {name: mx.array(array) for name, array in processed.arrays.items()}
        assert model.encode_media(arrays, [], "audio").shape == (1, processed.num_tokens, 64)
    assert processor.expansion("audio", 2) == ([3, AUDIO, AUDIO, EOA], 1)
    assert processor.rewrite("a<audio_soft_token>b") == "a\n\n<audio_soft_token>\n\nb"


REFUSED = {
    "relu": ({"hidden_activation": "relu"}, {}, "hidden_activation 'relu'"),
    "a head of its own": ({"tie_word_embeddings": False}, {}, "a head apart"),
    "rope": ({"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0}}}, {}, "rope type 'linear'"),
    "scaling": ({"rope_scaling": {"factor": 2.0}}, {}, "rope_scaling"),
    "heads": ({}, {"conf_num_attention_heads": 5}, "5 heads share a width of 32"),
    "another encoder": ({}, {}, "'resnet50' is not mobilenetv5_300m_enc", {"architecture": "resnet50"}),
    "an option of timm's": ({}, {}, "model_args 'block_args'", {"model_args": {"block_args": []}}),
    "other tokens": ({}, {}, "256 tokens of 2048, the encoder gives 64", {"model_args": {"msfa_output_resolution": 8}}),
    "kernels": ({}, {"sscp_conv_kernel_size": [3, 3]}, "audio: malformed"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_computed_is_refused(case):
    text, audio, reason, *vision = REFUSED[case]
    theta = {"rope_theta": 1e6, "rope_local_base_freq": 1e4}
    more = {"altup_coef_clip": 120.0, "altup_correct_scale": True, "altup_active_idx": 0, "rms_norm_eps": 1e-6}
    config = {
        "model_type": "gemma3n", "audio_config": {**AUDIO_TOWER, **audio},
        **({"vision_config": vision[0]} if vision else {}),
        "text_config": {**TEXT, **theta, **more, "model_type": "gemma3n_text", **text},
    }  # fmt: skip
    with pytest.raises(BadModel, match=reason):
        Gemma3nConfig.from_hf(config, 0)
