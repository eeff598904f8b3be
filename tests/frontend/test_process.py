"""`python -m frontend` as a process: refusals at start-up, a clean stop, nothing heavy imported."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shared.config import Settings
from shared.messages import Cancel, Hello
from shared.supervise import EXIT_CONFIG
from tests.frontend.conftest import TEMPLATE, TOKENIZER
from tests.support.fake_engine import FakeEngine


def run(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "frontend"]
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"TANDEM_MODEL": "/no/such/folder"}, "/no/such/folder"),
        ({"TANDEM_PROT": "1"}, "TANDEM_PROT"),
        ({"TANDEM_PORT": "many"}, "TANDEM_PORT: 'many'"),
        ({"TANDEM_TOOL_PARSER": "herms"}, "hermes"),
    ],
)
def test_bad_settings_and_models_stop_start_up(environment: dict[str, str], named: str, tmp_path: Path) -> None:
    done = run(environment | {"TANDEM_RUN_DIR": str(tmp_path)})
    assert done.returncode == EXIT_CONFIG
    assert named in done.stderr
    assert "Traceback" not in done.stderr


def test_it_serves_without_heavy_imports_and_stops_on_sigterm(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    TOKENIZER.save(str(model / "tokenizer.json"))
    (model / "config.json").write_text("{}")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    settings = Settings(run_dir=str(tmp_path / "run"))
    (tmp_path / "run").mkdir(mode=0o700)
    environment = {"TANDEM_MODEL": str(model), "TANDEM_RUN_DIR": settings.run_dir, "TANDEM_PORT": "0"}
    program = (
        "import sys, frontend.__main__ as m; code = m.main(); "
        "print(sorted({'mlx', 'torch', 'transformers', 'librosa'} & set(sys.modules)), code)"
    )
    with FakeEngine(settings.engine_endpoint) as engine:
        process = subprocess.Popen(
            [sys.executable, "-c", program], env=os.environ | environment, stdout=subprocess.PIPE, text=True
        )
        try:
            engine.wait_for(Hello, timeout_s=60)
            process.send_signal(signal.SIGTERM)
            out, _ = process.communicate(timeout=4)
        finally:
            process.kill()
            process.wait()
    assert out.splitlines()[-1] == "[] 0"
    assert process.returncode == 0
    assert not [m for m in engine.received if isinstance(m, Cancel)]
