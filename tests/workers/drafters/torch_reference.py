"""A plain PyTorch reading of what each drafter computes: whole sequences, no caches, loops where they are clearer.

Weights are a dict of our names to float64 tensors. `embed` is (V, H), `head` is (V, H).
"""

from __future__ import annotations

import torch


def rms_norm(x, weight, eps, zero_centred=False):
    scale = 1 + weight if zero_centred else weight
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * scale


def rope(x, positions, theta, dims):
    """Half-split rotation of the first `dims` of each head. x (T, heads, D), positions (T,)."""
    half = dims // 2
    freq = theta ** (-torch.arange(half, dtype=torch.float64) * 2 / dims)
    angle = positions.double()[:, None, None] * freq if positions.dim() == 1 else axial_angles(positions, freq)
    a, b, rest = x[..., :half], x[..., half:dims], x[..., dims:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), rest], -1)


def axial_angles(positions, freq):
    """positions (3, T) of time, height and width, which turn frequencies in turn; all but the first 6 turn by time."""
    axis = torch.tensor([i % 3 if i < 6 else 0 for i in range(len(freq))])
    return (positions.double()[axis].T * freq)[:, None]


class Dims:
    def __init__(self, heads, kv_heads, head_dim, eps, theta, rope_dims=None, zero_centred=False, gated=False):
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.eps, self.theta, self.rope_dims = eps, theta, rope_dims or head_dim
        self.zero_centred, self.gated = zero_centred, gated

    def norm(self, x, weight):
        return rms_norm(x, weight, self.eps, self.zero_centred)


def queries(w, prefix, x, positions, d):
    """(T, heads, D) and the gate (T, heads * D) or None."""
    q, gate = x @ w[prefix + "q_proj.weight"].T, None
    if d.gated:
        q = q.view(len(x), d.heads, 2 * d.head_dim)
        gate = q[..., d.head_dim :].reshape(len(x), -1)
        q = q[..., : d.head_dim]
    q = q.reshape(len(x), d.heads, d.head_dim)
    if prefix + "q_norm.weight" in w:
        q = d.norm(q, w[prefix + "q_norm.weight"])
    return rope(q, positions, d.theta, d.rope_dims), gate


def keys_values(w, prefix, x, positions, d):
    k = (x @ w[prefix + "k_proj.weight"].T).view(len(x), d.kv_heads, d.head_dim)
    v = (x @ w[prefix + "v_proj.weight"].T).view(len(x), d.kv_heads, d.head_dim)
    if prefix + "k_norm.weight" in w:
        k = d.norm(k, w[prefix + "k_norm.weight"])
    return rope(k, positions, d.theta, d.rope_dims), v


def attend(w, prefix, q, k, v, allowed, gate, d):
    """allowed (T, keys) bool -> (T, H)."""
    out = torch.zeros_like(q)
    for h in range(d.heads):
        kv = h // (d.heads // d.kv_heads)
        scores = (q[:, h] @ k[:, kv].T) / d.head_dim**0.5
        out[:, h] = scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v[:, kv]
    out = out.reshape(len(q), -1)
    return (out if gate is None else out * torch.sigmoid(gate)) @ w[prefix + "o_proj.weight"].T


def mlp(w, prefix, x):
    gate = x @ w[prefix + "gate_proj.weight"].T
    return (gate * torch.sigmoid(gate) * (x @ w[prefix + "up_proj.weight"].T)) @ w[prefix + "down_proj.weight"].T


def sparse_mlp(w, prefix, x, num_chosen):
    """Experts fused as (E, 2F, H) and (E, H, F), token by token; the shared one goes to all."""
    out = mlp(w, prefix + "shared_expert.", x) * torch.sigmoid(x @ w[prefix + "shared_expert_gate.weight"].T)
    chances = (x @ w[prefix + "gate.weight"].T).softmax(-1)
    for i, row in enumerate(x):
        values, chosen = chances[i].topk(num_chosen)
        for value, expert in zip(values / values.sum(), chosen, strict=True):
            gate, up = (w[prefix + "experts.gate_up_proj"][expert] @ row).chunk(2)
            out[i] += value * (w[prefix + "experts.down_proj"][expert] @ (gate * torch.sigmoid(gate) * up))
    return out


# ---------------------------------------------------------------- recursive heads


def _recursive(pairs_to_rows, features, tokens, num_tokens, choose, shift=0, axes=None):
    """Logits (num_tokens, ...) of the recursion; pair i = (feature i, token i+1) at rope position i, or axes[:, i]."""
    features, tokens = list(features), list(tokens[1:])
    logits = []
    for _ in range(num_tokens):
        positions = torch.arange(len(features)) + shift if axes is None else axes[:, : len(features)]
        row, fed_back = pairs_to_rows(torch.stack(features), tokens, positions)
        logits.append(row)
        tokens.append(choose(row))
        features.append(fed_back)
    return torch.stack(logits)


def eagle3(w, d, embed, head, features, tokens, num_tokens, choose, before_residual=False, norm_output=False, shift=0):
    """features (P, H) = fc rows of positions 0..P-1; tokens 0..P, the last one is the anchor."""

    def run(g, ids, positions):
        e = d.norm(embed[ids], w["layers.0.input_layernorm.weight"])
        h1 = d.norm(g, w["layers.0.hidden_norm.weight"])
        x = torch.cat([e, h1], -1)
        q, _ = queries(w, "layers.0.self_attn.", x, positions, d)
        k, v = keys_values(w, "layers.0.self_attn.", x, positions, d)
        n = len(ids)
        out = attend(w, "layers.0.self_attn.", q, k, v, torch.ones(n, n).tril().bool(), None, d)
        h = (h1 if before_residual else g) + out
        h = h + mlp(w, "layers.0.mlp.", d.norm(h, w["layers.0.post_attention_layernorm.weight"]))
        normed = d.norm(h, w["norm.weight"])
        return (normed @ head.T)[-1], (normed if norm_output else h)[-1]

    return _recursive(run, features, tokens, num_tokens, choose, shift)


def mtp(w, d, embed, head, features, tokens, num_tokens, choose, shift=0, num_chosen=0, axes=None):
    """features (P, H) = target rows after its final norm; num_chosen experts a token, 0: an MLP.

    axes (3, P + num_tokens): rope positions of tokens on three axes.
    """

    def run(hidden, ids, positions):
        e = d.norm(embed[ids], w["pre_fc_norm_embedding.weight"])
        x = torch.cat([e, d.norm(hidden, w["pre_fc_norm_hidden.weight"])], -1) @ w["fc.weight"].T
        n = d.norm(x, w["layers.0.input_layernorm.weight"])
        q, gate = queries(w, "layers.0.self_attn.", n, positions, d)
        k, v = keys_values(w, "layers.0.self_attn.", n, positions, d)
        size = len(ids)
        h = x + attend(w, "layers.0.self_attn.", q, k, v, torch.ones(size, size).tril().bool(), gate, d)
        n = d.norm(h, w["layers.0.post_attention_layernorm.weight"])
        h = h + (sparse_mlp(w, "layers.0.mlp.", n, num_chosen) if num_chosen else mlp(w, "layers.0.mlp.", n))
        normed = d.norm(h, w["norm.weight"])
        return (normed @ head.T)[-1], normed[-1]

    return _recursive(run, features, tokens, num_tokens, choose, shift, axes)


# ---------------------------------------------------------------- block drafters


def tap_fusion(w, d, taps):
    """taps: list of (P, H) -> context rows of a DFlash drafter."""
    return d.norm(torch.cat(list(taps), -1) @ w["fc.weight"].T, w["hidden_norm.weight"])


def convolve(w, prefix, side, x, source, taps, group):
    """y_i = sum_t (base[side, t] + delta_i[t, group of channel]) x_{i-t}, delta from the sublayer's input `source`."""
    groups = x.shape[1] // group
    delta = (source @ w[prefix + "kernel_projection.weight"].T).view(len(x), 2, taps, groups)[:, side]
    out = torch.zeros_like(x)
    for i in range(len(x)):
        for t in range(min(taps, i + 1)):
            coefficient = w[prefix + "base_kernel"][side, t] + delta[i, t].repeat_interleave(group)
            out[i] += coefficient * x[i - t]
    return out


def dflash_rows(w, d, embed, context, anchor, mask_id, block, causal, windows, conv=None, shift=0):
    """Rows (block, H) after the final norm. context (P, H); causal and windows per layer; conv (taps, group)."""
    p = len(context)
    x = embed[torch.tensor([anchor] + [mask_id] * (block - 1))]
    at = torch.arange(p), p + shift + torch.arange(block)
    for i, (is_causal, window) in enumerate(zip(causal, windows, strict=True)):
        a, m = f"layers.{i}.self_attn.", f"layers.{i}."
        source = n = d.norm(x, w[m + "input_layernorm.weight"])
        if conv:
            n = convolve(w, m + "attention_conv.", 0, n, source, *conv)
        q, gate = queries(w, a, n, at[1], d)
        ck, cv = keys_values(w, a, context, at[0], d)
        bk, bv = keys_values(w, a, n, at[1], d)
        allowed = torch.ones(block, p + block, dtype=torch.bool)
        for row in range(block):
            for column in range(p + block):
                if is_causal and column > p + row:
                    allowed[row, column] = False
                if window is not None and p + row - column >= window:
                    allowed[row, column] = False
        out = attend(w, a, q, torch.cat([ck, bk]), torch.cat([cv, bv]), allowed, gate, d)
        x = x + (convolve(w, m + "attention_conv.", 1, out, source, *conv) if conv else out)
        source = n = d.norm(x, w[m + "post_attention_layernorm.weight"])
        if conv:
            n = convolve(w, m + "mlp_conv.", 0, n, source, *conv)
        out = mlp(w, m + "mlp.", n)
        x = x + (convolve(w, m + "mlp_conv.", 1, out, source, *conv) if conv else out)
    return d.norm(x, w["norm.weight"])
