"""A language model as drafter: with a model drafting for itself every token is what greedy decoding gives."""

from __future__ import annotations

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

from mlx_lm.models import llama  # noqa: E402 - needs MLX
from mlx_lm.models.cache import ArraysCache  # noqa: E402 - needs MLX

from shared.errors import BadModel  # noqa: E402 - after the check for MLX
from tests.support.engine_rig import EngineRig, decoder_target, make_engine  # noqa: E402 - needs MLX
from workers.build_drafter import _causal_lm  # noqa: E402 - needs MLX
from workers.drafters import causal_lm  # noqa: E402 - needs MLX

pytestmark = pytest.mark.mlx

V = 40


@pytest.fixture(scope="module")
def model():
    mx.random.seed(3)
    arguments = llama.ModelArgs(
        model_type="llama",
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        vocab_size=V,
        tie_word_embeddings=True,
    )
    made = llama.Model(arguments)
    mx.eval(made.parameters())
    return made


def greedy(model, tokens, count):
    out = list(tokens)
    for _ in range(count):
        out.append(int(mx.argmax(model(mx.array([out]))[0, -1])))
    return out[len(tokens) :]


PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [9, 8, 30]]


def test_drafts_are_the_models_own_greedy_tokens(model):
    drafter = causal_lm.CausalLMDrafter(model, V)
    states = [drafter.new_state() for _ in PROMPTS]
    drafter.extend(states, [], [p[:-1] for p in PROMPTS])
    drafts = drafter.draft(states, [p[-1] for p in PROMPTS], 5).token_ids.tolist()
    assert drafts == [greedy(model, p, 5) for p in PROMPTS]


@pytest.mark.parametrize("num_accepted", [0, 2, 4])
def test_rounds_with_any_acceptance_draft_as_from_scratch(model, num_accepted):
    """Accept some, correct with another token, draft again: rows of rejected drafts must be gone."""
    drafter, tokens = causal_lm.CausalLMDrafter(model, V), list(PROMPTS[0])
    state = drafter.new_state()
    known = 0
    for _ in range(4):
        drafter.extend([state], [], [tokens[known:-1]])
        known = len(tokens) - 1
        draft = drafter.draft([state], [tokens[-1]], 4).token_ids.tolist()[0]
        assert draft == greedy(model, tokens, 4)
        tokens += [*draft[:num_accepted], (draft[num_accepted] + 1) % V if num_accepted < 4 else 11]


def test_only_new_tokens_are_run(model):
    """After a fully accepted draft the model ingests its last token and the anchor."""
    widths = []

    class Counting:
        layers = model.layers

        def __call__(self, inputs, cache):
            widths.append(inputs.shape[1])
            return model(inputs, cache=cache)

    drafter, tokens = causal_lm.CausalLMDrafter(Counting(), V), list(PROMPTS[0])
    state = drafter.new_state()
    drafter.extend([state], [], [tokens[:-1]])
    draft = drafter.draft([state], [tokens[-1]], 3).token_ids.tolist()[0]
    assert widths == [7, 1, 1]
    drafter.extend([state], [], [[tokens[-1], *draft]])
    drafter.draft([state], [5], 1)
    assert widths == [7, 1, 1, 2]


def test_long_prompt_is_run_in_chunks(model, monkeypatch):
    monkeypatch.setattr(causal_lm, "PREFILL_CHUNK", 8)
    drafter, tokens = causal_lm.CausalLMDrafter(model, V), [i % V for i in range(30)]
    state = drafter.new_state()
    drafter.extend([state], [], [tokens[:-1]])
    assert len(state.cached) == 24
    assert drafter.draft([state], [tokens[-1]], 3).token_ids.tolist() == [greedy(model, tokens, 3)]


def test_truncating_forgets_tokens(model):
    drafter = causal_lm.CausalLMDrafter(model, V)
    state = drafter.new_state()
    drafter.extend([state], [], [[1, 2, 3, 4, 5]])
    drafter.draft([state], [6], 2)
    assert drafter.truncate(state, 3) == 3
    assert drafter.draft([state], [7], 3).token_ids.tolist() == [greedy(model, [1, 2, 3, 7], 3)]


def test_sampler_sees_logits_of_the_targets_width(model):
    drafter = causal_lm.CausalLMDrafter(model, V + 3)
    state = drafter.new_state()
    drafter.extend([state], [], [[1, 2]])
    seen = []

    def sampler(logits, step):
        seen.append((step, np.array(logits)))
        return mx.array([4])

    assert drafter.draft([state], [3], 2, sampler).token_ids.tolist() == [[4, 4]]
    assert [step for step, _ in seen] == [0, 1]
    assert all(row.shape == (1, V + 3) and np.isneginf(row[:, V:]).all() for _, row in seen)
    second = np.array(model(mx.array([[1, 2, 3, 4]]))[0, -1])
    np.testing.assert_allclose(seen[1][1][0, :V], second, atol=1e-4)


def test_recurrent_draft_model_is_refused(model):
    with pytest.raises(BadModel, match="rolled back"):
        causal_lm.CausalLMDrafter(model, V, make_cache=lambda: [ArraysCache(2)])


@pytest.mark.parametrize("window", [None, 6])
def test_a_model_of_our_own_drafts_its_own_greedy_tokens(window):
    """With a sliding window too, over prompts and rolled-back drafts that are longer than it."""
    own = decoder_target(window=window)
    drafter = _causal_lm(own, own.vocab_size)
    reference = EngineRig(make_engine(own))
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9, 3]
    wanted = reference.run({"a": prompt}, 12)["a"]
    state = drafter.new_state()
    drafter.extend([state], [], [prompt[:-1]])
    assert drafter.draft([state], [prompt[-1]], 5).token_ids.tolist() == [wanted[:5]]
    drafter.extend([state], [], [[prompt[-1], *wanted[:3]]])  # of the five, three were accepted
    assert drafter.draft([state], [wanted[3]], 6).token_ids.tolist() == [wanted[4:10]]
