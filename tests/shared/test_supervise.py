"""The supervisor restarts, backs off, gives up, and passes signals on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from shared import supervise
from shared.beat import Watch, ready_path
from shared.supervise import BACKOFF_S, EXIT_CONFIG, MAX_EARLY_DEATHS, Supervisor


def python(program: str) -> list[str]:
    return [sys.executable, "-S", "-c", program]


def ending_with(codes: list[int], folder: Path) -> list[str]:
    """A child that ends with the next of `codes` at each start, and with 0 after them."""
    return python(
        f"import os; n = len(os.listdir({str(folder)!r})); open({str(folder)!r} + f'/{{n}}', 'x'); "
        f"codes = {codes}; os._exit(codes[n] if n < len(codes) else 0)"
    )


def test_a_child_that_dies_is_started_again_with_growing_pauses(tmp_path: Path) -> None:
    pauses: list[float] = []
    supervisor = Supervisor("child", ending_with([1, 2, 3], tmp_path), sleep=pauses.append)
    assert supervisor.run() == 0
    assert pauses == list(BACKOFF_S[:3])
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.skipif(sys.platform != "linux", reason="shared memory is a folder on Linux only")
def test_what_openmp_keeps_for_a_killed_child_is_removed() -> None:
    """1 KB for each process; a machine that ran for months would have many."""
    name = supervise.OPENMP_FILE.format(pid="{os.getpid()}", uid="{os.getuid()}")
    program = f"import os; n = f'{name}'; open(n, 'x'); print(n, flush=True); os.kill(os.getpid(), 9)"
    supervisor = Supervisor("child", python(program), sleep=lambda _: None, max_early_deaths=2)
    before = set(Path("/dev/shm").glob("__KMP_REGISTERED_LIB_*"))
    assert supervisor.run() == 1
    left = set(Path("/dev/shm").glob("__KMP_REGISTERED_LIB_*")) - before
    assert supervisor._child is not None
    assert not [file for file in left if f"_{supervisor._child.pid}_" in file.name]


def test_it_gives_up_after_repeated_early_deaths(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pauses: list[float] = []
    supervisor = Supervisor("child", ending_with([9] * 100, tmp_path), sleep=pauses.append)
    assert supervisor.run() == 1
    assert len(list(tmp_path.iterdir())) == MAX_EARLY_DEATHS
    assert len(pauses) == MAX_EARLY_DEATHS - 1
    assert "giving up" in capfd.readouterr().err


def test_a_long_life_between_deaths_starts_the_count_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "EARLY_DEATH_S", 0.0)  # every life counts as long
    pauses: list[float] = []
    supervisor = Supervisor("child", ending_with([1] * 8, tmp_path), sleep=pauses.append)
    assert supervisor.run() == 0
    assert pauses == [BACKOFF_S[0]] * 8


def test_a_worker_that_was_ready_is_always_started_again(tmp_path: Path) -> None:
    """With growing pauses; only deaths before it is ready add up."""
    beat, folder = tmp_path / "child.beat", tmp_path / "starts"
    folder.mkdir()
    is_ready = [True] * 7 + [False] * (MAX_EARLY_DEATHS - 1) + [True] + [False] * MAX_EARLY_DEATHS
    program = (
        f"import os; n = len(os.listdir({str(folder)!r})); open({str(folder)!r} + f'/{{n}}', 'x'); "
        f"{is_ready}[n] and open({str(ready_path(beat))!r}, 'w').close(); os._exit(1)"
    )
    pauses: list[float] = []
    supervisor = Supervisor("child", python(program), sleep=pauses.append, watch=Watch(beat, 100))
    assert supervisor.run() == 1
    assert len(list(folder.iterdir())) == len(is_ready)
    assert pauses == [*BACKOFF_S, *[BACKOFF_S[-1]] * (len(is_ready) - 1 - len(BACKOFF_S))]


def test_a_bad_setting_or_model_is_final_at_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    supervisor = Supervisor("child", ending_with([EXIT_CONFIG], tmp_path), sleep=lambda _: pytest.fail("a restart"))
    assert supervisor.run() == EXIT_CONFIG
    assert "child refused to start" in capfd.readouterr().err


def start(program: str) -> subprocess.Popen[str]:
    """The supervisor as a process; its child says "up" once it runs."""
    command = [sys.executable, "-m", "shared.supervise", "child", "--", *python(program)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    return process


WAITS = "import signal, sys; {handler}; print('up', flush=True); signal.pause(); signal.pause()"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_and_sigint_reach_the_child_as_sigterm(number: signal.Signals) -> None:
    handler = "signal.signal(signal.SIGTERM, lambda *_: (print('told', flush=True), sys.exit(5)))"
    process = start(WAITS.format(handler=handler))
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, "told\n", "")


def test_a_child_that_does_not_stop_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    process = start(WAITS.format(handler="signal.signal(signal.SIGTERM, signal.SIG_IGN)"))
    (child,) = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=supervise.STOP_GRACE_S + 20) == 0
    assert not child.is_running()
    process.communicate()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_a_child_does_not_outlive_a_killed_supervisor() -> None:
    process = start(WAITS.format(handler="None"))
    (child,) = psutil.Process(process.pid).children()
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=20)
    psutil.wait_procs([child], timeout=20)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_a_supervisor_sleeps_while_its_child_runs() -> None:
    """Four of them wait beside an idle server: one that asked for its child's state every 50 ms would wake 40 times."""
    process = start(WAITS.format(handler="None"))
    supervisor = psutil.Process(process.pid)
    before = supervisor.num_ctx_switches().voluntary
    time.sleep(2.0)  # the measurement itself
    assert supervisor.num_ctx_switches().voluntary - before < 15
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)


def test_a_child_learns_how_the_one_before_it_ended(tmp_path: Path) -> None:
    program = (
        f"import os; n = len(os.listdir({str(tmp_path)!r})); "
        f"open({str(tmp_path)!r} + f'/{{n}}', 'w').write(os.environ.get('SUPERVISE_LAST_EXIT', 'none')); "
        "n == 0 and os._exit(3); n == 1 and os.kill(os.getpid(), 9)"
    )
    assert Supervisor("child", python(program), sleep=lambda _: None).run() == 0
    assert [(tmp_path / str(i)).read_text() for i in range(3)] == ["none", "3", "-9"]


def test_sighup_restarts_the_child_and_counts_as_no_death(tmp_path: Path) -> None:
    handler = "signal.signal(signal.SIGHUP, lambda *_: (print('told', flush=True), sys.exit(0)))"
    process = start(WAITS.format(handler=handler))
    assert process.stdout is not None
    for _ in range(supervise.MAX_EARLY_DEATHS + 1):
        process.send_signal(signal.SIGHUP)
        assert [process.stdout.readline(), process.stdout.readline()] == ["told\n", "up\n"]
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "giving up" not in err


@pytest.mark.parametrize("stopped", [True, False])
def test_a_child_whose_beats_stop_is_replaced(
    stopped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """By a signal or by itself; one that never beat is left alone (it may still be loading)."""
    monkeypatch.setattr(supervise, "LOOK_S", 0.1)
    beat = tmp_path / "child.beat"
    hang = "os.kill(os.getpid(), 19)" if stopped else "time.sleep(60)"
    program = (
        "import os, time; "
        f"first = os.environ.get('SUPERVISE_LAST_EXIT') is None; first and open({str(beat)!r}, 'w').close(); "
        f"\nif first: {hang}\nelse: time.sleep(0.5)"
    )
    pauses: list[float] = []
    supervisor = Supervisor("child", python(program), sleep=pauses.append, watch=Watch(beat, 3))
    assert supervisor.run() == 0
    assert len(pauses) == 1
    assert "child hangs; killing it" in capfd.readouterr().err


def test_wrong_arguments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert supervise.main(["child", "command"]) == 2
    assert "usage" in capsys.readouterr().err


def test_sigusr1_reaches_the_child_which_is_not_started_again() -> None:
    handler = "signal.signal(signal.SIGUSR1, lambda *_: (print('told', flush=True), sys.exit(7)))"
    process = start(WAITS.format(handler=handler))
    process.send_signal(signal.SIGUSR1)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, "told\n", "")


def test_sigusr2_ends_the_child_until_sighup() -> None:
    handler = "signal.signal(signal.SIGTERM, lambda *_: (print('told', flush=True), sys.exit(0)))"
    process = start(WAITS.format(handler=handler))
    assert process.stdout is not None and process.stderr is not None
    for number in (signal.SIGHUP, signal.SIGTERM):
        process.send_signal(signal.SIGUSR2)
        assert process.stdout.readline() == "told\n"
        assert process.stderr.readline() == "supervise: child ended, as it was told\n"  # it knows, before the next
        process.send_signal(number)
        if number == signal.SIGHUP:
            assert process.stdout.readline() == "up\n"
    assert process.wait(30) == 0
    process.stdout.close()
    process.stderr.close()


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux to tell of the parent's end")
def test_a_supervisor_ends_with_its_parent() -> None:
    """As when honcho is told to end while it starts its processes, which it then leaves behind."""
    supervisor = [sys.executable, "-m", "shared.supervise", "child", "--", *python(WAITS.format(handler="pass"))]
    parent = subprocess.Popen(
        python(f"import subprocess, time; subprocess.Popen({supervisor!r}); time.sleep(60)"),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == "up\n"
    left = psutil.Process(parent.pid).children(recursive=True)
    assert len(left) == 2
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(left, timeout=20)
    assert not alive
    parent.stdout.close()


def test_a_supervisor_that_finds_its_parent_gone_starts_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HONCHO_PROCESS_NAME", "child.1")
    monkeypatch.setenv("TANDEM_RUN_DIR", str(tmp_path))
    monkeypatch.setattr(supervise.os, "getppid", lambda: 1)
    monkeypatch.setattr(supervise, "_die_with_parent", lambda: None)  # this process is pytest's
    monkeypatch.setattr(supervise.signal, "signal", lambda *_: None)
    assert supervise.main(["child", "--", *python(f"open({str(tmp_path / 'ran')!r}, 'w')")]) == 0
    assert not (tmp_path / "ran").exists()
