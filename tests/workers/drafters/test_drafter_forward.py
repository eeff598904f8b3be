"""Forward passes against the PyTorch reading in torch_reference.py, on tiny random checkpoints."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
mx = pytest.importorskip("mlx.core")

import tiny_checkpoints as tiny  # noqa: E402 - MLX and torch may be missing
import torch_reference as reference  # noqa: E402 - needs torch

from workers.drafters.checkpoint import detect  # noqa: E402 - needs MLX
from workers.drafters.registry import load_drafter, load_fusion, tables  # noqa: E402 - needs MLX
from workers.kernels.choice import AttentionChoice, ShapeClass  # noqa: E402 - needs MLX
from workers.kernels.reference import ReferenceAttention  # noqa: E402 - needs MLX

pytestmark = [pytest.mark.mlx, pytest.mark.oracle]

TOLERANCE = 1e-4
LENGTHS = (9, 4, 1)  # three sequences of a batch; none a multiple of anything
K = 4

DIMS = (tiny.HEADS, tiny.KV_HEADS, tiny.HEAD_DIM, tiny.EPS, tiny.THETA)


class Recorder:
    """A sampler that is greedy and keeps the logits it saw."""

    def __init__(self):
        self.logits = []

    def __call__(self, logits, step):
        assert step == len(self.logits)
        self.logits.append(np.array(logits))
        return mx.argmax(logits, axis=-1)


class Case:
    """Random target tables, taps and tokens for a batch."""

    def __init__(self, lengths=LENGTHS):
        random = np.random.default_rng(1)
        self.lengths = lengths
        self.embed = random.standard_normal((tiny.V, tiny.H)).astype(np.float32)
        self.head = random.standard_normal((tiny.V, tiny.H)).astype(np.float32)
        self.taps = [random.standard_normal((tiny.TAPS, n, tiny.H)).astype(np.float32) for n in lengths]
        self.tokens = [random.integers(0, tiny.V, n + 1).tolist() for n in lengths]  # the last one is the anchor

    def fused(self, config, count=None):
        fusion = load_fusion(config, mx.float32)
        taps = tiny.TAPS if config.feature == "taps" else 1
        return [fusion([mx.array(t[i]) for i in range(taps)]) for t in self.taps[:count]]

    def drafter(self, config):
        return load_drafter(config, mx.float32, *tables(mx.array(self.embed), mx.array(self.head)))

    def draft(self, config, num_tokens=K, chunks=1, features=None):
        """(ids (B, k), logits (B, k, V)) after extending in `chunks` parts."""
        drafter, rows = self.drafter(config), features or self.fused(config)
        states = [drafter.new_state() for _ in rows]
        for part in range(chunks):
            cuts = [(n * part // chunks, n * (part + 1) // chunks) for n in self.lengths]
            drafter.extend(
                states,
                [r[a:b] for r, (a, b) in zip(rows, cuts, strict=True)],
                [t[a:b] for t, (a, b) in zip(self.tokens, cuts, strict=True)],
            )
        recorder = Recorder()
        anchors = [t[-1] for t in self.tokens]
        sampled = drafter.draft(states, anchors, num_tokens, recorder)
        greedy = drafter.draft(states, anchors, num_tokens)  # drafting leaves the states as they were
        assert greedy.token_ids.tolist() == sampled.token_ids.tolist()
        return np.array(sampled.token_ids), np.stack(recorder.logits, axis=1)


def doubles(arrays):
    return {k: torch.from_numpy(np.asarray(v)).double() for k, v in arrays.items() if v.dtype != np.bool_}


def tensor(array):
    return torch.from_numpy(np.array(array)).double()


def argmax(row):
    return int(row.argmax())


def assert_close(ours, theirs):
    np.testing.assert_allclose(ours, np.asarray(theirs), atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("options", [{}, {"norm_before_residual": True}, {"norm_output": True}], ids=str)
def test_eagle3_agrees_with_pytorch(tmp_path, options):
    folder, arrays = tiny.eagle3(tmp_path, **options)
    case, weights = Case(), doubles(arrays)
    _, logits = case.draft(detect(folder))
    for b, n in enumerate(case.lengths):
        rows = torch.cat([tensor(case.taps[b][i]) for i in range(tiny.TAPS)], -1) @ weights["fc.weight"].T
        assert rows.shape == (n, tiny.H)
        want = reference.eagle3(
            weights,
            reference.Dims(*DIMS),
            tensor(case.embed),
            tensor(case.head),
            rows,
            case.tokens[b],
            K,
            argmax,
            before_residual=bool(options.get("norm_before_residual")),
            norm_output=bool(options.get("norm_output")),
        )
        assert_close(logits[b], want)


@pytest.mark.parametrize("qwen", [False, True])
def test_mtp_agrees_with_pytorch(tmp_path, qwen):
    folder, arrays = tiny.mtp(tmp_path, qwen=qwen)
    case, weights = Case(), doubles(arrays)
    config = detect(folder)
    assert config.has_zero_centred_norms is qwen
    _, logits = case.draft(config)
    dims = reference.Dims(*DIMS, rope_dims=tiny.HEAD_DIM // 4 if qwen else None, zero_centred=qwen, gated=qwen)
    for b in range(len(case.lengths)):
        want = reference.mtp(
            weights, dims, tensor(case.embed), tensor(case.head), tensor(case.taps[b][0]), case.tokens[b], K, argmax
        )
        assert_close(logits[b], want)


LAYOUTS = {
    "causal": ({"is_causal": True}, (True, True), (None, None)),
    "bidirectional": ({}, (False, False), (None, None)),
    "sliding and full": (
        {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4},
        (True, False),
        (4, None),
    ),
    "sliding, bidirectional": (
        {"layer_types": ["sliding_attention"] * 2, "sliding_window": 6, "is_causal": False},
        (False, False),
        (6, 6),
    ),
}


def block_rows(case, b, arrays, block, causal, windows, **options):
    weights, dims = doubles(arrays), reference.Dims(*DIMS)
    context = reference.tap_fusion(weights, dims, [tensor(case.taps[b][i]) for i in range(tiny.TAPS)])
    return reference.dflash_rows(
        weights, dims, tensor(case.embed), context, case.tokens[b][-1], 7, block, causal, windows, **options
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dflash_agrees_with_pytorch(tmp_path, layout):
    extra, causal, windows = LAYOUTS[layout]
    folder, arrays = tiny.dflash(tmp_path, **extra)
    config, case = detect(folder), Case()
    assert (config.causal_layers, config.windows) == (causal, windows)
    _, logits = case.draft(config)
    for b in range(len(case.lengths)):
        rows = block_rows(case, b, arrays, config.block_size, causal, windows)
        assert_close(logits[b], rows[1:] @ tensor(case.head).T)


@pytest.mark.parametrize("num_tokens", [1, 2])
def test_short_draft_of_a_block_is_the_start_of_the_long_one(tmp_path, num_tokens):
    for name, extra in (("causal", {"is_causal": True}), ("bidirectional", {"is_causal": False})):
        folder, _ = tiny.dflash(tmp_path / name, **extra)
        case = Case()
        _, long = case.draft(detect(folder))
        _, short = case.draft(detect(folder), num_tokens)
        assert_close(short, long[:, :num_tokens])


def test_dspark_agrees_with_pytorch(tmp_path):
    """All rows predict; each token's logits get W2 W1[previous token]; the confidence sees row and W1[previous]."""
    folder, arrays = tiny.dflash(tmp_path, markov=True, dflash_config={"projector_type": "dspark"})
    config, case = detect(folder), Case()
    assert config.is_anchor_sampled
    assert config.max_draft_tokens == config.block_size
    assert config.causal_layers == (False, False)
    k = config.block_size
    ids, logits = case.draft(config, k)
    drafter, rows = case.drafter(config), case.fused(config)
    states = [drafter.new_state() for _ in rows]
    drafter.extend(states, rows, [t[:-1] for t in case.tokens])
    confidences = np.array(drafter.draft(states, [t[-1] for t in case.tokens], k).confidences)
    w = doubles(arrays)
    for b in range(len(case.lengths)):
        hidden = block_rows(case, b, arrays, k, (False, False), (None, None))
        previous = case.tokens[b][-1]
        for j in range(k):
            code = w["markov_head.markov_w1.weight"][previous]
            assert_close(logits[b, j], hidden[j] @ tensor(case.head).T + w["markov_head.markov_w2.weight"] @ code)
            score = w["confidence_head.proj.weight"][0] @ torch.cat([hidden[j], code]) + w["confidence_head.proj.bias"]
            assert_close(confidences[b, j], torch.sigmoid(score)[0])
            previous = int(ids[b, j])


def test_dflash2_agrees_with_pytorch(tmp_path):
    """Convolution around attention and MLP; four candidates a row, rescored by the token picked before."""
    folder, arrays = tiny.dflash(tmp_path, conv=True, selector=True, is_causal=False)
    config, case = detect(folder), Case()
    ids, logits = case.draft(config)
    w = doubles(arrays)
    for b in range(len(case.lengths)):
        hidden = block_rows(case, b, arrays, 5, (False, False), (None, None), conv=(2, 8))[1:]
        previous = case.tokens[b][-1]
        for j in range(K):
            unary = hidden[j] @ tensor(case.head).T
            best = unary.topk(4).indices
            a = w["candidate_selector.predecessor_codebook"][previous]
            p = w["candidate_selector.hidden_projection.weight"] @ hidden[j]
            want = torch.full((tiny.V,), -torch.inf, dtype=torch.float64)
            want[best] = unary[best] + w["candidate_selector.successor_codebook"][best] @ (a * p)
            assert_close(logits[b, j], want)
            previous = int(ids[b, j])
            assert previous == int(want.argmax())


def test_eagle3_norm_before_fc_is_part_of_the_fusion(tmp_path):
    folder, arrays = tiny.eagle3(tmp_path, input_norm=True)
    case, w = Case(), doubles(arrays)
    rows = case.fused(detect(folder))
    for b in range(len(case.lengths)):
        taps = torch.cat([tensor(case.taps[b][i]) for i in range(tiny.TAPS)], -1)
        assert_close(np.array(rows[b]), reference.rms_norm(taps, w["input_norm.weight"], tiny.EPS) @ w["fc.weight"].T)


def test_eagle3_reduced_vocabulary_maps_offsets_to_target_ids(tmp_path):
    size = 20
    folder, arrays = tiny.eagle3(tmp_path, draft_vocab_size=size, own_head=True, rename_layer="layers.0.")
    case, w = Case(), doubles(arrays)
    ids, logits = case.draft(detect(folder))
    kept = np.flatnonzero(arrays["t2d"])
    assert logits.shape[-1] == tiny.V
    outside = np.setdiff1d(np.arange(tiny.V), kept)
    assert np.isneginf(logits[..., outside]).all()
    assert np.isin(ids, kept).all()
    for b in range(len(case.lengths)):
        rows = torch.cat([tensor(case.taps[b][i]) for i in range(tiny.TAPS)], -1) @ w["fc.weight"].T
        want = reference.eagle3(
            w,
            reference.Dims(*DIMS),
            tensor(case.embed),
            w["lm_head.weight"],
            rows,
            case.tokens[b],
            K,
            lambda row: int(kept[int(row.argmax())]),
        )
        assert_close(logits[b][:, kept], want)
        assert ids[b].tolist() == [int(kept[int(r.argmax())]) for r in want]


# ---------------------------------------------------------------- shifts by one are seen


def test_taps_in_another_order_change_the_result(tmp_path):
    for name, make in (("dflash", tiny.dflash), ("eagle3", tiny.eagle3)):
        folder, _ = make(tmp_path / name)
        case = Case()
        _, right = case.draft(detect(folder))
        case.taps = [np.roll(t, 1, axis=0) for t in case.taps]
        _, wrong = case.draft(detect(folder))
        assert np.abs(right - wrong).max() > 100 * TOLERANCE


def test_features_shifted_by_one_position_change_the_result(tmp_path):
    for name, make in (("dflash", tiny.dflash), ("eagle3", tiny.eagle3), ("mtp", tiny.mtp)):
        folder, _ = make(tmp_path / name)
        case, config = Case((9, 4)), detect(folder)
        _, right = case.draft(config)
        shifted = [mx.concatenate([r[-1:], r[:-1]]) for r in case.fused(config)]
        _, wrong = case.draft(config, features=shifted)
        assert np.abs(right - wrong).max() > 100 * TOLERANCE


def test_block_rope_shifted_by_one_changes_the_result(tmp_path):
    folder, arrays = tiny.dflash(tmp_path, is_causal=True)
    case = Case()
    _, logits = case.draft(detect(folder))
    rows = block_rows(case, 0, arrays, 5, (True, True), (None, None), shift=1)
    assert np.abs(logits[0] - np.asarray(rows[1:] @ tensor(case.head).T)).max() > 100 * TOLERANCE


def test_slot_shifted_by_one_changes_the_result(tmp_path):
    folder, arrays = tiny.dflash(tmp_path, is_causal=True)
    case = Case()
    _, logits = case.draft(detect(folder))
    rows = block_rows(case, 0, arrays, 5, (True, True), (None, None))
    assert np.abs(logits[0] - np.asarray(rows[:-1] @ tensor(case.head).T)).max() > 100 * TOLERANCE


# ---------------------------------------------------------------- states

MAKERS = {
    "dflash": tiny.dflash,
    "eagle3": tiny.eagle3,
    "mtp": tiny.mtp,
    "qwen mtp": lambda folder: tiny.mtp(folder, qwen=True),
    "sliding": lambda folder: tiny.dflash(folder, layer_types=["sliding_attention"] * 2, sliding_window=5),
}


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("chunks", [2, 4])
def test_extending_in_parts_equals_extending_at_once(tmp_path, maker, chunks):
    folder, _ = MAKERS[maker](tmp_path)
    case = Case((13, 6, 4))
    _, whole = case.draft(detect(folder))
    _, parts = case.draft(detect(folder), chunks=chunks)
    assert_close(parts, whole)


@pytest.mark.parametrize("maker", MAKERS)
def test_truncating_and_extending_again_equals_never_having_gone_on(tmp_path, maker):
    folder, _ = MAKERS[maker](tmp_path)
    case, config = Case((13,)), detect(folder)
    drafter, (rows,), (tokens,) = case.drafter(config), case.fused(config), case.tokens
    for keep in (1, 5, 12):
        fresh, state = drafter.new_state(), drafter.new_state()
        drafter.extend([fresh], [rows[:12]], [tokens[:12]])
        wrong = mx.concatenate([rows[:keep], rows[keep:][::-1]])
        drafter.extend([state], [wrong], [tokens[:keep] + tokens[keep:13][::-1]])
        start = drafter.truncate(state, keep)
        assert start in (keep, keep - 1)
        assert state.length == start
        drafter.extend([state], [rows[start:12]], [tokens[start:12]])
        recorder = Recorder()
        drafter.draft([state, fresh], [tokens[12]] * 2, K, recorder)
        for logits in recorder.logits:
            assert_close(logits[0], logits[1])


@pytest.mark.parametrize("maker", ["dflash", "eagle3", "mtp"])
def test_state_may_start_behind_the_first_position(tmp_path, maker):
    """Rope is absolute: with a late start the rows that are there are the same as before."""
    folder, _ = MAKERS[maker](tmp_path)
    case, config = Case((13,)), detect(folder)
    drafter, (rows,), (tokens,) = case.drafter(config), case.fused(config), case.tokens
    whole, late = drafter.new_state(), drafter.new_state(start=4)
    drafter.extend([whole], [rows], [tokens[:13]])
    drafter.extend([late], [rows[4:]], [tokens[4:13]])
    assert late.length == whole.length == 13
    count = late.num_rows
    rows_of = drafter.contexts.rows
    for one, other in zip(rows_of(whole, 0), rows_of(late, 0), strict=True):
        assert_close(np.array(one[:, 4 : 4 + count]), np.array(other))
    assert drafter.can_draft(late)
    assert drafter.draft([late], [tokens[-1]], 2).token_ids.shape == (1, 2)


@pytest.mark.parametrize("maker", ["dflash", "eagle3", "mtp"])
def test_state_without_context_is_refused(tmp_path, maker):
    folder, _ = MAKERS[maker](tmp_path)
    drafter = Case().drafter(detect(folder))
    state = drafter.new_state()
    assert not drafter.can_draft(state)
    with pytest.raises(ValueError, match="cannot draft"):
        drafter.draft([state], [1], 1)


def test_long_context_grows_the_buffers(tmp_path):
    """Past several capacities, in uneven parts, against one extension."""
    folder, _ = tiny.eagle3(tmp_path)
    case, config = Case((301, 70)), detect(folder)
    _, whole = case.draft(config)
    _, parts = case.draft(config, chunks=37)
    assert_close(parts, whole)


@pytest.mark.parametrize("maker", ["dflash", "eagle3", "mtp"])
@pytest.mark.parametrize("has_kernels", [False, True], ids=["stock", "kernels' way"])
def test_a_batch_over_capacity_classes_equals_each_sequence_alone(tmp_path, maker, has_kernels):
    """Rows lie in pools of two classes, in another order than the batch's; slots are those of ended sequences."""
    folder, _ = MAKERS[maker](tmp_path)
    case, config = Case((600, 13, 700, 40)), detect(folder)
    drafter, rows = case.drafter(config), case.fused(config)
    if has_kernels:
        shapes = [
            ShapeClass(drafter.num_query_heads, spec.num_kv_heads, spec.key_dim, width, mx.float32)
            for spec in drafter.contexts.store.specs
            for width in range(17)
        ]
        drafter.use_attention(AttentionChoice(ReferenceAttention(), dict.fromkeys(shapes, True)))
    ended = [drafter.new_state() for _ in range(3)]
    drafter.extend(ended, [r[:9] for r in rows[:3]], [t[:9] for t in case.tokens[:3]])
    for state in ended:
        drafter.release(state)
    states = [drafter.new_state() for _ in rows]
    drafter.extend(states, rows, [t[:-1] for t in case.tokens])
    recorder = Recorder()
    drafter.draft(states, [t[-1] for t in case.tokens], K, recorder)
    for b, (row, tokens) in enumerate(zip(rows, case.tokens, strict=True)):
        alone, own = case.drafter(config), Recorder()
        state = alone.new_state()
        alone.extend([state], [row], [tokens[:-1]])
        alone.draft([state], tokens[-1:], K, own)
        for one, other in zip(recorder.logits, own.logits, strict=True):
            assert_close(one[b], other[0])
