"""What LoRA adapters add to a step of the engine: `python -m bench.adapters --adapters 4 --rank 16`.

The embedded model (or `--model`), no server, random adapters of every projection in its layers. Each step is run by an
engine without adapters and by one that has them, for rows that use none, one, and all of them in turn; the best of
`--repeats` counts.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import blas, report
from shared.model_files import ModelFiles

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
STEPS: tuple[tuple[str, tuple[int, ...], int], ...] = (  # what, drafts of each decode row, tokens of a prompt's chunk
    ("1 decode row", (0,), 0),
    ("8 decode rows", (0,) * 8, 0),
    ("8 rows with 3 drafts", (3,) * 8, 0),
    ("128 prompt tokens", (), 128),
)


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    blas.preload(blas.find(options.blas), options.blas_threads)
    from bench.engine_steps import CONTEXT

    rows = measure(options.model, options.adapters, options.rank, options.repeats)
    arms = list(rows[0]["ms"])
    cells = [[row["rows"], *(f"{row['ms'][arm]:.1f}" for arm in arms)] for row in rows]
    print(report.table(["rows of the step", *arms], cells))
    result = {
        **report.provenance("adapters"), "adapters": options.adapters, "rank": options.rank, "context": CONTEXT,
        "repeats": options.repeats, "steps": rows,
    }  # fmt: skip
    report.finish(result, options.json)
    return 0


def measure(model: str | None, num_adapters: int, rank: int, repeats: int) -> list[dict[str, Any]]:
    """Milliseconds of each of `STEPS`, by arm.

    Raises:
        BadModel: the model cannot be loaded, or has none of the projections.
    """
    import msgspec

    from bench.engine_steps import CAPACITY, step_seconds
    from shared.adapters import to_setting
    from shared.config import Settings, load
    from shared.model_files import resolve
    from workers.build import load_target, make_engine, warm_up

    settings = Settings(max_num_seqs=16, max_model_len=CAPACITY, prefix_cache=False)
    files = resolve(model or load().model, load())
    with tempfile.TemporaryDirectory() as folder:
        plain = load_target(files, settings)
        places = write(files, num_adapters, rank, Path(folder))
        adapted = load_target(files, msgspec.structs.replace(settings, adapters=to_setting(places)))
    engines = []
    for loaded in (plain, adapted):
        engine, info = make_engine(loaded, settings)
        warm_up(engine, info)
        engines.append(engine)
    names = list(places)
    arms: dict[str, tuple[Any, list[str]]] = {
        "none loaded": (engines[0], [""]),
        "loaded, unused": (engines[1], [""]),
        "one for all rows": (engines[1], names[:1]),
        "all in turn": (engines[1], names),
    }
    found = []
    for name, drafts, num_prompt in STEPS:
        best = dict.fromkeys(arms, float("inf"))
        for _ in range(repeats + 1):  # the first round grows buffers
            for arm, (engine, used) in arms.items():
                best[arm] = min(best[arm], step_seconds(engine, drafts, num_prompt, used))
        found.append({"rows": name, "ms": {arm: 1000 * seconds for arm, seconds in best.items()}})
    return found


def write(files: ModelFiles, num_adapters: int, rank: int, folder: Path) -> Mapping[str, str]:
    """Random adapters of a model in PEFT's form: name -> folder."""
    import mlx.core as mx

    from shared.errors import BadModel
    from workers.adapters.install import linears, sizes
    from workers.load.folder import load_folder
    from workers.load.gguf import load_gguf

    # Before anything is joined: names and sizes only, no weight is read.
    if files.gguf is not None:
        model, _ = load_gguf(files.gguf, 0)
    else:
        assert files.folder is not None, "a model is a folder or a GGUF file"
        model, _ = load_folder(files.folder, 0)
    found = {path: sizes(module) for path, module in linears(model).items() if path.endswith(PROJECTIONS)}
    if not found:
        raise BadModel("this model has no projections of the usual names")
    places = {}
    for i in range(num_adapters):
        place = folder / f"adapter-{i}"
        place.mkdir()
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank}
        (place / "adapter_config.json").write_text(json.dumps(config))
        tensors = {}
        for path, (size_in, size_out) in found.items():
            tensors[f"base_model.model.{path}.lora_A.weight"] = 0.01 * mx.random.normal((rank, size_in))
            tensors[f"base_model.model.{path}.lora_B.weight"] = 0.01 * mx.random.normal((size_out, rank))
        mx.save_safetensors(str(place / "adapter_model.safetensors"), tensors)
        places[place.name] = str(place)
    return places


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="as TANDEM_MODEL")
    parser.add_argument("--adapters", type=int, default=4, help="how many are loaded")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--blas", default="auto", help='Linux without a GPU: "auto", "off" or a library')
    parser.add_argument("--blas-threads", type=int)
    parser.add_argument("--json", type=Path)
    return parser


if __name__ == "__main__":
    sys.exit(main())
