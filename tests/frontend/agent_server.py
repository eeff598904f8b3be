"""A server whose template knows tools and reasoning, and an engine that says what a script tells it to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import anthropic

from frontend.media.loader import MediaLoader
from shared.config import Settings
from shared.messages import Submit
from tests.frontend.conftest import EOS, RunningServer, byte_text, ids
from tests.support.fake_engine import FakeEngine, says, worker_info

TEMPLATE = (
    "{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}</tools>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{% if c.function.arguments is mapping %}[call {{ c.function.name }} "
    "{{ c.function.arguments | tojson }}]{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if reasoning_effort %}({{ reasoning_effort }}){% endif %}"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


class AgentServer:
    """`script` is what the engine says, one output for each request; `prompts` is what it was asked."""

    def __init__(self, engine: FakeEngine, server: RunningServer) -> None:
        self.engine = engine
        self.server = server
        self.script: list[str] = []
        self.chunk = 3
        engine.on_submit = self._answer

    def _answer(self, engine: FakeEngine, submit: Submit) -> None:
        says([*ids(self.script.pop(0)), EOS], chunk=self.chunk)(engine, submit)

    def reset(self, *script: str, chunk: int = 3) -> None:
        self.engine.forget_received()
        self.engine.on_submit = self._answer
        self.script = list(script)
        self.chunk = chunk

    @property
    def prompts(self) -> list[str]:
        submits = [m for m in self.engine.received if isinstance(m, Submit)]
        tokenizer = byte_text().tokenizer
        return [tokenizer.decode(s.prompt_token_ids, skip_special_tokens=False) for s in submits]

    def anthropic(self, **options: object) -> anthropic.Anthropic:
        given = {"api_key": "none", "max_retries": 0, "timeout": 20} | options
        return anthropic.Anthropic(base_url=self.server.url, **given)  # type: ignore[arg-type]  # a test's own keywords


@contextmanager
def running(
    folder: Path,
    *,
    template: str = TEMPLATE,
    media_of: Callable[[Settings], MediaLoader] | None = None,
    **options: object,
) -> Iterator[AgentServer]:
    settings = Settings(run_dir=str(folder), cache_dir=str(folder / "cache"), heartbeat_interval_s=0.2, **options)  # type: ignore[arg-type]
    with FakeEngine(settings.engine_endpoint, info=worker_info(max_model_len=200_000)) as engine:
        media = media_of(settings) if media_of is not None else None
        server = RunningServer(settings, byte_text(chat_template=template), media=media)
        try:
            server.wait_status("/health", 200)
            yield AgentServer(engine, server)
        finally:
            server.close()
