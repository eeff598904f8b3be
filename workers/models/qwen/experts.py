"""Experts in place of a layer's MLP, and the forms in which checkpoints store them."""

# mypy: disable-error-code="misc, no-any-return"
# mlx.nn has no types, so its modules are Any to mypy.

from __future__ import annotations

import re

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.qwen3_next import Qwen3NextMLP
from mlx_lm.models.switch_layers import SwitchGLU

_ONE = re.compile(r"(.*\.mlp)\.experts\.(\d+)\.((?:gate|up|down)_proj\.weight)")


class SparseMLP(nn.Module):
    """The weighted sum of what the experts chosen for each token give, under the names of mlx-lm's checkpoints.

    Args:
        shared_inner: width of one more expert, which every token goes to by a gate of its own; 0: there is none.
    """

    def __init__(self, hidden: int, inner: int, num_experts: int, num_chosen: int, shared_inner: int = 0) -> None:
        super().__init__()
        self.num_chosen = num_chosen
        self.gate = nn.Linear(hidden, num_experts, bias=False)
        self.switch_mlp = SwitchGLU(hidden, inner, num_experts)
        self.has_shared_expert = shared_inner > 0
        if self.has_shared_expert:
            self.shared_expert = Qwen3NextMLP(hidden, shared_inner)
            self.shared_expert_gate = nn.Linear(hidden, 1, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """x (B, L, H). A softmax over the chosen scores equals one over all of them that is then normalised."""
        scores = self.gate(x).astype(mx.float32)
        chosen = mx.argpartition(scores, kth=-self.num_chosen, axis=-1)[..., -self.num_chosen :]
        weights = mx.softmax(mx.take_along_axis(scores, chosen, axis=-1), axis=-1).astype(x.dtype)
        out = (self.switch_mlp(x, chosen) * weights[..., None]).sum(axis=-2)
        if self.has_shared_expert:
            out = out + mx.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
        return out


def split_experts(weights: dict[str, mx.array], hidden: int) -> dict[str, mx.array]:
    """One array each for all experts' gates, ups and downs: `switch_mlp.{gate,up,down}_proj.weight`.

    Checkpoints hold gates and ups of all experts in one array, (E, 2F, H) or, in Qwen3-VL's, (E, H, 2F); or arrays of
    each expert. What is split already stays as it is.
    """
    made: dict[str, mx.array] = {}
    found: dict[str, dict[int, mx.array]] = {}
    for name, weight in weights.items():
        match = _ONE.fullmatch(name)
        if match is None:
            made[name] = weight
        else:
            found.setdefault(f"{match[1]}.switch_mlp.{match[3]}", {})[int(match[2])] = weight
    made |= {name: mx.stack([each[i] for i in sorted(each)]) for name, each in found.items()}
    for base in [n.removesuffix("experts.gate_up_proj") for n in made if n.endswith(".mlp.experts.gate_up_proj")]:
        gate_up, down = made.pop(base + "experts.gate_up_proj"), made.pop(base + "experts.down_proj")
        # (E, 2F, H) and (E, H, F) can never look like this.
        if gate_up.shape[1] == hidden and down.shape[2] == hidden:
            gate_up, down = gate_up.swapaxes(1, 2), down.swapaxes(1, 2)
        gate, up = mx.split(gate_up, 2, axis=1)
        for part, weight in (("gate", gate), ("up", up), ("down", down)):
            made[f"{base}switch_mlp.{part}_proj.weight"] = weight
    return made
