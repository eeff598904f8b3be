"""Bodies and queries generated from /openapi.json: none makes the server fail.

`make fuzz-api` sends 5,000 cases; here they are fewer. Hypothesis draws the same ones each time unless FUZZ_SEED says
otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import schemathesis

from shared.messages import CacheReply
from tests.frontend.agent_server import AgentServer, running
from tests.frontend.conftest import EOS, ids
from tests.support.fake_engine import says

NUM_CASES = int(os.environ.get("FUZZ_API_CASES", "400"))
MODES = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentServer]:
    with running(tmp_path_factory.mktemp("run"), tool_parser="hermes", reasoning_parser="think") as agent:
        agent.engine.cache_reply = CacheReply(query_id=0, enabled=False)
        agent.engine.on_submit = says([*ids("<think>I see</think>Hello"), EOS], chunk=100)
        yield agent


def strategies(page: dict[str, Any]) -> list[Any]:
    """Well-formed cases for each operation, malformed ones where it has a body."""
    found = []
    schema = schemathesis.openapi.from_dict(page)
    for result in schema.get_all_operations():
        operation = result.ok()
        assert operation is not None, result
        takes = "body" if operation.body else "path" if operation.path_parameters else ""
        weight = {"body": 6, "path": 3}.get(takes, 1)
        for mode in MODES if takes == "body" else MODES[:1]:  # any text is a path parameter
            found.append((operation, mode, weight))
    return found


@pytest.mark.timeout(1800)
def test_no_case_makes_the_server_fail(agent: AgentServer) -> None:
    page = agent.server.http.get("/openapi.json").json()
    cases = strategies(page)
    total = sum(weight for _, _, weight in cases)
    body = {"input": "Hi", "background": True}
    stored_ids = [agent.server.http.post("/v1/responses", json=body).json()["id"] for _ in range(NUM_CASES // 20)]
    num_sent = 0
    statuses: dict[int, int] = {}
    for operation, mode, weight in cases:

        def send(case: Any) -> None:
            nonlocal num_sent
            if isinstance(case.body, dict) and "model" in case.body and num_sent % 4:
                case.body["model"] = "default"  # other names are a 404 at once
            if "response_id" in case.path_parameters and num_sent % 4:
                case.path_parameters["response_id"] = stored_ids.pop() if len(stored_ids) > 1 else stored_ids[0]
            response = case.call(base_url=agent.server.url, session=None, timeout=20)
            num_sent += 1
            statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
            assert response.status_code < 500, f"{case.as_curl_command()}\n{response.text}"

        test = hypothesis.given(case=operation.as_strategy(generation_mode=mode))(send)
        limit = hypothesis.settings(
            max_examples=max(1, NUM_CASES * weight // total + 1),
            deadline=None,
            database=None,
            derandomize="FUZZ_SEED" not in os.environ,
            suppress_health_check=list(hypothesis.HealthCheck),
            phases=[hypothesis.Phase.generate],
        )
        limit(hypothesis.seed(int(os.environ["FUZZ_SEED"]))(test) if "FUZZ_SEED" in os.environ else test)()
    print(f"{num_sent} cases: {statuses}")
    assert num_sent >= NUM_CASES * 0.9  # a route without parameters has one case
    assert statuses.get(200, 0) > NUM_CASES // 20, statuses
