"""The dashboard, the alerts and the scrape configuration of docs/, against the metrics that there are."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from frontend.metrics import HttpMetrics
from scheduler.metrics import Metrics
from tests.support.prometheus import PROMETHEUS, PROMTOOL, WHY_NOT, prometheus
from tests.support.server import REPOSITORY, Server

DASHBOARD = REPOSITORY / "docs" / "grafana" / "tandem.json"
FOLDER = REPOSITORY / "docs" / "prometheus"
ALERTS = FOLDER / "alerts.yml"
PAGE = REPOSITORY / "docs" / "monitoring.md"

NAME = re.compile(r"\b(?:vllm|tandem|http)[_:][a-zA-Z0-9_:]+")
# The test's server has no neural drafter, so no drafts are waited for: a share of nothing.
MAY_BE_NAN = "tandem:draft_seconds"


def panels() -> Iterator[dict[str, Any]]:
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        if panel["type"] != "row":
            yield panel


def queries() -> list[tuple[str, str]]:
    """(panel, expression) of every query."""
    return [(panel["title"], target["expr"]) for panel in panels() for target in panel["targets"]]


def families() -> dict[str, str]:
    """Name and kind of all that the two parts of the page can have."""
    page = (Metrics().page() + HttpMetrics().page(0)).decode()
    return dict(re.findall(r"^# TYPE (\S+) (\S+)", page, re.MULTILINE))


def known_names() -> set[str]:
    """Every series by its full name."""
    names = set()
    for name, kind in families().items():
        names |= {f"{name}{suffix}" for suffix in ("_bucket", "_sum", "_count")} if kind == "histogram" else {name}
    return names


def named(text: str) -> set[str]:
    return set(NAME.findall(text))


def test_dashboard_and_alerts_name_metrics_that_exist() -> None:
    texts = [expression for _, expression in queries()]
    texts += [line for line in ALERTS.read_text().splitlines() if "summary:" not in line and "next:" not in line]
    used = set().union(*map(named, texts)) - {"tandem"}
    assert len(used) > 30
    assert used <= known_names()


def test_every_metric_is_described_and_none_besides() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in named(row.split("|")[1])} == set(families())


def test_panels_do_not_overlap_and_have_words() -> None:
    cells: dict[tuple[int, int], str] = {}
    for panel in panels():
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        assert panel["description"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert cells.setdefault((x, y), panel["title"]) == panel["title"], "two panels in one place"
    ids = [panel["id"] for panel in json.loads(DASHBOARD.read_text())["panels"]]
    assert len(ids) == len(set(ids))


@pytest.mark.skipif(PROMTOOL is None, reason=WHY_NOT)
@pytest.mark.parametrize(
    "command", ["check config prometheus.yml", "check rules alerts.yml", "test rules alerts_test.yml"]
)
def test_promtool_is_content(command: str) -> None:
    assert PROMTOOL is not None
    done = subprocess.run([PROMTOOL, *command.split()], cwd=FOLDER, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def traffic(server: Server) -> None:
    """Requests that prefill, hit the cache, draft and end."""
    letters = httpx.post(f"{server.url}/tokenize", json={"prompt": "ab"}).json()["tokens"]
    body = {
        "model": "default", "prompt": "ab" * 40, "max_tokens": 60, "temperature": 0, "ignore_eos": True,
        "logit_bias": {str(token): 60 for token in letters},
    }  # fmt: skip
    for _ in range(2):
        httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).raise_for_status()


@pytest.mark.system
@pytest.mark.mlx
@pytest.mark.skipif(PROMETHEUS is None, reason=WHY_NOT)
def test_every_query_returns_data_from_a_running_server(drafting_server: Server, tmp_path: Path) -> None:
    config = (FOLDER / "prometheus.yml").read_text()
    assert "127.0.0.1:8080" in config and "scrape_interval: 5s" in config
    config = config.replace("127.0.0.1:8080", f"127.0.0.1:{drafting_server.port}").replace(
        "interval: 5s", "interval: 500ms"
    )
    config = config.replace("scrape_interval: 500ms", "scrape_interval: 500ms\n  scrape_timeout: 500ms")
    (tmp_path / "prometheus.yml").write_text(config)
    shutil.copy(ALERTS, tmp_path)
    with prometheus(tmp_path / "prometheus.yml", tmp_path / "data") as running:
        traffic(drafting_server)
        running.wait_for('up{job="tandem"} == 1')
        # A rate needs two scrapes; this one moves between two of them.
        scrapes = "count_over_time(vllm:generation_tokens_total[1m]) >= 2"
        running.wait_for(scrapes)
        before = running.query("sum(vllm:generation_tokens_total)")[0]["value"][1]
        traffic(drafting_server)
        running.wait_for(
            f"sum(vllm:generation_tokens_total) > {before} and sum(rate(vllm:request_success_total[1m])) > 0"
        )
        for panel, expression in queries():
            filled = expression.replace("$__rate_interval", "1m").replace("$model", ".*")
            assert "$" not in filled, "a variable that the test does not know"
            result = running.query(filled)
            assert result, f"{panel}: no data for {filled}"
            values = [float(series["value"][1]) for series in result]
            assert MAY_BE_NAN in filled or not all(map(math.isnan, values)), f"{panel}: only NaN for {filled}"
        rules = running.ask("rules")["groups"][0]["rules"]
        assert len(rules) == ALERTS.read_text().count("- alert:")
        assert running.query('ALERTS{alertstate="firing"}') == []
        (target,) = running.ask("targets")["activeTargets"]
        assert target["health"] == "up", target["lastError"]
