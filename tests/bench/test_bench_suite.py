"""The runner of all GPU figures: order, limits, and commands that their programs take."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shlex
import time

import pytest

from bench.suite import GROUPS, Suite, Task, main


@pytest.fixture
def sleeper(tmp_path, monkeypatch):
    """`python -m sleeper SECONDS CODE` notes its GPU and ends with the code."""
    (tmp_path / "sleeper.py").write_text(
        "import os, sys, time\n"
        "time.sleep(float(sys.argv[1]))\n"
        "print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ.get('MORE'), sys.argv[3:])\n"
        "print('cores', *sorted(os.sched_getaffinity(0)))\n"
        "sys.exit(int(sys.argv[2]))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def test_groups_are_shared_out_over_gpus_and_their_tasks_run_in_order(sleeper):
    groups = {
        "slow": (Task("a", "sleeper 0.5 0", 10.0, {"MORE": "yes"}), Task("b", "sleeper 0 3", 10.0, has_json=False)),
        "quick": (Task("c", "sleeper 0 0", 10.0),),
    }
    ended = {row["task"]: row for row in Suite(groups, sleeper, time.monotonic() + 60).run(["0", "1"])}
    assert [ended[name]["result"] for name in "abc"] == ["done", "exit 3", "done"]
    assert ended["a"]["gpu"] == ended["b"]["gpu"] != ended["c"]["gpu"]
    assert "yes" in (sleeper / "a.log").read_text()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) > 1:  # each GPU's tasks have cores of their own
        a, c = (set((sleeper / f"{name}.log").read_text().partition("cores")[2].split()) for name in "ac")
        assert not a & c and len(a) == len(c) == len(cores) // 2
    assert "a.json" in (sleeper / "a.log").read_text() and "json" not in (sleeper / "b.log").read_text()


def test_a_task_that_does_not_fit_is_left_out_and_one_that_does_not_end_is_ended(sleeper):
    groups = {"x": (Task("long", "sleeper 60 0", 0.5), Task("late", "sleeper 0 0", 100.0))}
    long, late = Suite(groups, sleeper, time.monotonic() + 50).run(["0"])
    assert (long["result"], late["result"]) == ("too long", "left out")
    assert long["seconds"] < 20


def test_an_unknown_group_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--groups", "steps,nothing", "--out", str(tmp_path)])
    assert "nothing" in capsys.readouterr().err


@pytest.mark.mlx
@pytest.mark.parametrize("task", [task for tasks in GROUPS.values() for task in tasks], ids=lambda task: task.name)
def test_every_command_is_one_that_its_program_takes(task, tmp_path, monkeypatch):
    """Parsed by the program itself, without running it."""
    module, *arguments = shlex.split(task.command.format(out=tmp_path))
    if task.has_json:
        arguments += ["--json", str(tmp_path / "x.json")]
    program = importlib.import_module(module)
    seen = {}

    class Parsed(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def parsed(self, args=None, namespace=None):
        seen["options"] = parse(self, args, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    with pytest.raises(Parsed):
        program.main(arguments)
    assert json.dumps(sorted(vars(seen["options"]), key=str))
