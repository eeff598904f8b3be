"""The command line: documents, a run in two visits, the folder that comes out."""

from __future__ import annotations

import json

import numpy as np
import pytest
from training_rig import spoken_documents, tiny_target

from bench import train_drafter
from workers.drafters.checkpoint import detect

pytestmark = pytest.mark.mlx


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def data(folder):
    documents = spoken_documents(tiny_target(folder / "target"), num=12)
    documents.split[-3:] = 1
    documents.save(folder / "documents.npz")
    return folder / "documents.npz"


def run(capsys, *arguments):
    assert train_drafter.main([str(a) for a in arguments]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("kind", ["dflash", "eagle3", "mtp"])
def test_a_run_in_two_visits_leaves_a_drafter_that_loads(kind, folder, data, capsys):
    out = folder / kind
    common = ["train", "--target", folder / "target", "--data", data, "--kind", kind, "--layers", 1, "--taps", "0,1,2"]
    common += ["--mask-token", 7, "--tokens-per-step", 128, "--checkpoint", folder / f"{kind}.safetensors"]
    common += ["--out", out, "--quiet"]
    first = run(capsys, *common, "--steps", 4)
    assert first["steps"] == 4
    second = run(capsys, *common, "--steps", 7)
    assert second["steps"] == 3
    found = second["results"]["greedy"]
    assert found["num_documents"] == 3 and found["mean_acceptance_length"] >= 1
    assert detect(out, json.loads((folder / "target" / "config.json").read_text())).kind == kind
    assert json.loads((out / "curve.json").read_text())["curve"][-1]["step"] == 7
    assert f"| {found['mean_acceptance_length']:.2f} |" in (out / "README.md").read_text()
    again = run(capsys, "evaluate", "--target", folder / "target", "--data", data, "--drafter", out)
    # What is exported is bfloat16.
    assert again["results"]["greedy"]["mean_acceptance_length"] == pytest.approx(
        found["mean_acceptance_length"], rel=0.1
    )


@pytest.mark.parametrize("kind", ["dflash", "eagle3", "mtp"])
def test_a_drafter_that_is_made_wider_begins_as_it_was(kind, folder, data, capsys):
    common = ["train", "--target", folder / "target", "--data", data, "--kind", kind, "--layers", 1, "--taps", "0,1,2"]
    common += ["--mask-token", 7, "--tokens-per-step", 128, "--quiet"]
    narrow = run(capsys, *common, "--out", folder / f"{kind}-narrow", "--steps", 6)
    wide = [*common, "--out", folder / f"{kind}-wide", "--from-drafter", folder / f"{kind}-narrow", "--inner-size", 160]
    same = run(capsys, *wide, "--steps", 1, "--rate", 1e-9, "--norm-rate", 1e-9)
    assert json.loads((folder / f"{kind}-wide" / "config.json").read_text())["intermediate_size"] == 160
    lengths = [found["results"]["greedy"]["mean_acceptance_length"] for found in (narrow, same)]
    assert lengths[1] == pytest.approx(lengths[0], rel=0.1)  # what lies between is bfloat16
    judged = ["evaluate", "--target", folder / "target", "--data", data, "--drafter", folder / f"{kind}-wide"]
    assert run(capsys, *judged)["results"]["greedy"]["mean_acceptance_length"] == pytest.approx(lengths[1], rel=0.1)
    with pytest.raises(SystemExit, match="their own width"):
        run(capsys, *common, "--out", folder / "none", "--steps", 1, "--init", "target", "--inner-size", 160)


def test_generating_twice_adds_documents(folder, capsys):
    out = folder / "made.npz"
    arguments = ["generate", "--target", folder / "target", "--out", out, "--slots", 4, "--capacity", 400, "--quiet"]
    arguments += ["--max-answer", 4, "--steps-per-read", 16, "--seconds", 0.5]
    tiny_target(folder / "target")
    first = run(capsys, *arguments)
    second = run(capsys, *arguments)
    assert out.exists() and second["documents"] >= first["documents"]
    with np.load(out) as arrays:
        assert len(arrays["lengths"]) == second["documents"]
