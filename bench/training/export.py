"""A trained drafter as a folder that the workers load: config.json, model.safetensors (bfloat16), README.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx

from bench.training.dflash import DFlash
from bench.training.parts import Params, Trained


def export(folder: Path, drafter: Trained, params: Params, card: str, dtype: mx.Dtype = mx.bfloat16) -> None:
    """Write the folder. The taps' scale goes into `fc`, so that nothing tells this from any public checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: value.astype(mx.float32) for name, value in params.items()}
    if drafter.taps and drafter.tap_scale is not None:
        arrays["fc.weight"] = arrays["fc.weight"] / drafter.tap_scale.astype(mx.float32)[None]
    match drafter.kind:
        case "eagle3":
            arrays = {name.replace("layers.0.", "midlayer."): value for name, value in arrays.items()}
        case "mtp":
            arrays = {"mtp." + name: value for name, value in arrays.items()}
    arrays = {name: value.astype(dtype) for name, value in arrays.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config(drafter, dtype), indent=1) + "\n")
    (folder / "README.md").write_text(card)


def config(drafter: Trained, dtype: mx.Dtype = mx.bfloat16) -> dict[str, Any]:
    shape = drafter.shape
    common: dict[str, Any] = {
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.inner_size,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_theta": shape.rope_theta,
        "hidden_act": "silu",
        "max_position_embeddings": shape.max_positions,
        "tie_word_embeddings": True,
        "torch_dtype": str(dtype).removeprefix("mlx.core."),
    }
    match drafter:
        case DFlash():
            own: dict[str, Any] = {
                "architectures": ["DFlashDraftModel"],
                "model_type": "qwen3",
                "num_hidden_layers": drafter.num_layers,
                "num_target_layers": shape.num_target_layers,
                "block_size": drafter.block_size,
                "is_causal": drafter.is_causal,
                "dflash_config": {
                    "target_layer_ids": list(drafter.taps),
                    "mask_token_id": drafter.mask_token_id,
                    "causal": drafter.is_causal,
                },
            }
        case _ if drafter.kind == "eagle3":
            own = {
                "architectures": ["LlamaForCausalLMEagle3"],
                "model_type": "llama",
                "num_hidden_layers": 1,
                "draft_vocab_size": shape.vocab_size,
                "eagle_aux_hidden_state_layer_ids": [tap + 1 for tap in drafter.taps],
                "norm_before_residual": False,
            }
        case _:
            own = {
                "architectures": ["LlamaMTP"],
                "model_type": "llama_mtp",
                "mtp_num_hidden_layers": 1,
                "num_hidden_layers": 1,
            }
    return own | common


def card(title: str, facts: dict[str, Any], results: dict[str, dict[str, Any]]) -> str:
    """The README: `facts` as a list, `results` (of `evaluate.measure`) as a table. Only measured values go in."""
    lines = [f"# {title}", "", *(f"- {name}: {value}" for name, value in facts.items()), ""]
    if results:
        lines += [
            "Mean acceptance length (tokens committed per forward of the target, its own one included) on held-out",
            "documents that the target wrote, and the chance that each draft is accepted, given those before it:",
            "",
            "| documents | number | mean acceptance length | by position |",
            "|---|---:|---:|---|",
        ]
        for name, found in results.items():
            shares = " ".join(f"{share:.2f}" for share in found["by_position"])
            lines.append(f"| {name} | {found['num_documents']} | {found['mean_acceptance_length']:.2f} | {shares} |")
        lines.append("")
    return "\n".join(lines)
