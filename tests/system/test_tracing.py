"""OpenTelemetry spans of real requests, sent over OTLP to a receiver on loopback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.server import REPOSITORY, Server
from tests.support.stream import BODY, Stream

otlp = pytest.importorskip("tests.support.otlp")

pytestmark = [pytest.mark.system, pytest.mark.mlx]

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT_ID = "b7ad6b7169203331"
SAMPLED, NOT_SAMPLED = "01", "00"


def traceparent(flags: str) -> dict[str, str]:
    return {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-{flags}"}


def attributes(span: Any) -> dict[str, Any]:
    values = {a.key: a.value for a in span.attributes}
    return {key: getattr(value, value.WhichOneof("value")) for key, value in values.items()}


def test_requests_sequences_and_their_phases_are_spans_of_the_clients_trace(model: Path, tmp_path: Path) -> None:
    with otlp.Receiver() as receiver:
        server = Server(model, tmp_path, tracing=True)
        server.environment["OTEL_EXPORTER_OTLP_ENDPOINT"] = receiver.url
        with server:
            url = f"{server.url}/v1/completions"
            two = httpx.post(url, json=BODY | {"n": 2, "max_tokens": 5}, headers=traceparent(SAMPLED), timeout=60)
            assert two.status_code == 200, two.text
            assert httpx.post(url, json=BODY, headers=traceparent(NOT_SAMPLED), timeout=60).status_code == 200
            assert httpx.get(f"{server.url}/health").status_code == 200
            with httpx.stream("POST", url, json=BODY | {"stream": True, "max_tokens": 400}, timeout=60) as left:
                next(left.iter_lines())
            server.wait_for(lambda: server.metric("vllm:num_requests_running") == 0, "idle")
            assert Stream(server, max_tokens=3).result()
        assert server.process is not None
        assert server.process.returncode == 0
    assert receiver.service_names == {"tandem"}
    spans = {span.span_id: span for span in receiver.spans}
    requests = [s for s in receiver.spans if s.name == "POST /v1/completions"]
    assert len(requests) == 3, "the one that was not sampled, and /health, have none"
    assert all(attributes(s)["http.route"] == "/v1/completions" for s in requests)
    (first,) = [s for s in requests if s.trace_id.hex() == TRACE_ID]
    assert first.parent_span_id.hex() == PARENT_ID
    sequences = [s for s in receiver.spans if s.name == "generate_content tiny"]
    assert len(sequences) == 4
    assert all(spans[s.parent_span_id] in requests for s in sequences)
    ended = [s for s in sequences if s.parent_span_id == first.span_id]
    assert len(ended) == 2
    for sequence in ended:
        known = attributes(sequence)
        assert known["gen_ai.usage.input_tokens"] == two.json()["usage"]["prompt_tokens"]
        assert known["gen_ai.usage.output_tokens"] == 5
        assert [v.string_value for v in known["gen_ai.response.finish_reasons"].values] == ["length"]
        parts = [s for s in receiver.spans if s.parent_span_id == sequence.span_id]
        assert [s.name for s in parts] == ["queue", "prefill", "decode"]
        assert parts[0].start_time_unix_nano >= sequence.start_time_unix_nano
        assert [p.end_time_unix_nano for p in parts[:2]] == [p.start_time_unix_nano for p in parts[1:]]
        assert parts[-1].end_time_unix_nano <= sequence.end_time_unix_nano
        assert all(p.end_time_unix_nano > p.start_time_unix_nano for p in parts[1:])
    reasons = [attributes(s)["gen_ai.response.finish_reasons"].values[0].string_value for s in sequences]
    assert sorted(reasons) == ["abort", "length", "length", "length"]


def test_without_tracing_nothing_of_it_is_imported() -> None:
    code = "import sys, frontend.__main__; print([m for m in sys.modules if m.startswith('opentelemetry.sdk')])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=REPOSITORY)
    assert ran.stdout.strip() == "[]", ran.stderr


def test_tracing_without_its_packages_is_refused_by_name(model: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['opentelemetry.sdk'] = None\n")
    server = Server(model, tmp_path, tracing=True)
    server.environment["PYTHONPATH"] = f"{tmp_path}:{REPOSITORY}"
    command = [sys.executable, "-m", "frontend"]
    ran = subprocess.run(command, env=server.environment, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 78
    assert "pip install 'mlx-tandem[otel]'" in ran.stderr
