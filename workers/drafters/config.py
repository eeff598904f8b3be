"""What a drafter checkpoint is: one struct for every kind, in one set of conventions.

Taps are zero-based block ids; the feature of tap t is the residual stream *after* block t, before the final norm
(Hugging Face `hidden_states[t + 1]`). `workers/drafters/checkpoint.py` converts from the other conventions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

from msgspec import Struct

from workers.models.rope import RopeParameters

Kind = Literal["dflash", "eagle3", "mtp", "assistant", "model"]
KINDS: tuple[Kind, ...] = get_args(Kind)

Feature = Literal["taps", "final_hidden", "hidden_and_kv", "none"]


class DrafterConfig(Struct, frozen=True, kw_only=True):
    """A drafter as its checkpoint describes it. A "model" drafter only fills `kind`, `path` and `max_draft_tokens`."""

    kind: Kind
    path: Path
    max_draft_tokens: int  # longest draft of one call

    # what the target captures and sends
    feature: Feature = "none"  # "final_hidden": the target's hidden rows after its final norm
    taps: tuple[int, ...] = ()
    kv_layers: tuple[int, ...] = ()  # "hidden_and_kv": the blocks whose keys and values travel behind the hidden row
    kv_shapes: tuple[tuple[int, int], ...] = ()  # (num_kv_heads, head_dim) of each

    # the drafter's own transformer
    hidden_size: int = 0
    num_layers: int = 0
    num_heads: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0
    vocab_size: int = 0  # the target's
    draft_vocab_size: int = 0  # == vocab_size unless the head is reduced
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_dims: int = 0
    rope_traditional: bool = False  # False: half-split (NeoX) pairs
    rope_scaling: dict[str, Any] | None = None
    rope_sections: tuple[int, ...] = ()  # frequencies that time, height and width turn; empty: there is one axis
    axial_rope: RopeParameters | None = None  # of those
    max_position_embeddings: int = 0
    has_zero_centred_norms: bool = False  # stored weight w means a factor 1 + w
    has_own_embedding: bool = False  # otherwise the target's rows, unscaled, times embedding_scale
    has_own_head: bool = False
    embedding_scale: float = 1.0
    logit_multiplier: float = 1.0  # applied before the softcap
    logit_softcap: float | None = None

    # MTP
    num_chosen_experts: int = 0  # for each token; 0: an MLP in place of experts
    has_shared_expert: bool = False

    # EAGLE-3
    norm_before_residual: bool = False
    norm_output: bool = False  # the recursion is fed the row after the output norm

    # DFlash and its variants
    block_size: int = 0
    mask_token_id: int = 0
    is_anchor_sampled: bool = False  # row 0 predicts too (DSpark), otherwise rows 1 .. block_size-1
    causal_layers: tuple[bool, ...] = ()  # (num_layers,) whether row i of the block sees only rows <= i
    windows: tuple[int | None, ...] = ()  # (num_layers,) a sliding layer sees the last window-1 context rows
    markov_rank: int = 0  # DSpark: logits += W2 W1[previous token]
    has_confidence: bool = False
    is_confidence_fed_markov: bool = False
    conv_num_taps: int = 0  # DFlash 2: dynamic convolution along the block, around attention and MLP
    conv_group_size: int = 0
    selector_rank: int = 0  # DFlash 2: transition scores between candidates of neighbouring rows
    selector_top_k: int = 0

    @property
    def feature_size(self) -> int:
        """Numbers of a row that the target sends."""
        return self.hidden_size + sum(2 * heads * dim for heads, dim in self.kv_shapes)
