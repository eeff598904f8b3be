"""The chat page in a real Chromium, in front of an engine that says what the test wants."""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from frontend.media.loader import MediaLoader
from shared.config import Settings
from shared.messages import Cancel, FinishReason, Submit, Verified
from tests.frontend.conftest import EOS, TOKENIZER, RunningServer, byte_text, ids
from tests.frontend.page_markdown import CASES
from tests.frontend.test_media import PROCESSOR, encoded, picture
from tests.support.browser import IS_MISSING, WHY_NOT, Visit, chromium
from tests.support.fake_engine import FakeEngine, says, worker_info

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator

pytestmark = pytest.mark.skipif(IS_MISSING, reason=WHY_NOT)

PICTURES = os.environ.get("PAGE_PICTURES", "")  # a folder: pictures of the page are put there, to be looked at
TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}"
    "{% elif m.content %}{% for p in m.content %}{% if p.type == 'image' %}<|endoftext|>{% else %}{{ p.text }}"
    "{% endif %}{% endfor %}{% endif %}{% for c in m.tool_calls or [] %}[call {{ c.function.name }}]{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CITY = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": CITY}}]
ANSWER = "<think>The user greets me.</think>Hello **you**.\n\n| a | b |\n|---|--:|\n| 1 | 2 |\n\n```py\nx = 1\n```\n"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


class Site:
    """A server, its engine, and what the engine is asked."""

    def __init__(self, engine: FakeEngine, server: RunningServer) -> None:
        self.engine = engine
        self.server = server
        self.submits: list[Submit] = []

    def answers(self, *texts: str, chunk: int = 4) -> None:
        """Each request gets the next text at once."""
        queue = list(texts)
        self.submits.clear()

        def answer(engine: FakeEngine, submit: Submit) -> None:
            self.submits.append(submit)
            says([*ids(queue.pop(0)), EOS], chunk=chunk)(engine, submit)

        self.engine.on_submit = answer

    def waits(self) -> None:
        """Requests get what the test sends with `say`."""
        self.submits.clear()
        self.engine.forget_received()
        self.engine.on_submit = lambda engine, submit: self.submits.append(submit)

    def asked(self) -> Submit:
        self.engine.wait_for(Submit)
        return self.submits[-1]

    def say(self, text: str, verified: Verified | None = None, finish_reason: FinishReason | None = None) -> None:
        self.engine.send_output(self.asked().request_id, ids(text), verified=verified, finish_reason=finish_reason)

    def prompt(self, number: int = -1) -> str:
        text: str = TOKENIZER.decode(self.submits[number].prompt_token_ids, skip_special_tokens=False)
        return text

    def visit(self, browser: Browser, **options: Any) -> Visit:
        visit = Visit(browser, **options)
        visit.page.goto(f"{self.server.url}/ui")
        visit.page.wait_for_selector("#model-state[data-state=ready]")
        return visit


@pytest.fixture(scope="module")
def start_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Site]]:
    opened: list[tuple[FakeEngine, RunningServer]] = []

    def start(**options: Any) -> Site:
        folder = tmp_path_factory.mktemp("run")
        settings = Settings(
            run_dir=str(folder), cache_dir=str(folder / "cache"), heartbeat_interval_s=0.2, tool_parser="hermes",
            reasoning_parser="think", **options,
        )  # fmt: skip
        engine = FakeEngine(settings.engine_endpoint, info=worker_info(max_model_len=20_000)).start()
        server = RunningServer(settings, byte_text(chat_template=TEMPLATE), media=MediaLoader(PROCESSOR, settings))
        opened.append((engine, server))
        server.wait_status("/health", 200)
        return Site(engine, server)

    yield start
    for engine, server in opened:
        server.close()
        engine.stop()


@pytest.fixture(scope="module")
def site(start_site: Callable[..., Site]) -> Site:
    return start_site()


@pytest.fixture(scope="module")
def quiet(browser: Browser, site: Site) -> Iterator[Visit]:
    """A page for tests that only call its modules."""
    with site.visit(browser) as visit:
        yield visit


def send(visit: Visit, text: str) -> None:
    visit.page.fill("#prompt", text)
    visit.page.keyboard.press("Enter")


def last_answer(visit: Visit) -> Locator:
    return visit.page.locator(".assistant").last


def wait_answered(visit: Visit, number: int = 1) -> Locator:
    """The last of so many answers, complete."""
    visit.page.wait_for_function(
        "n => document.querySelectorAll('.assistant').length == n && !document.querySelector('.streaming')", arg=number
    )
    return last_answer(visit)


def take_picture(visit: Visit, name: str) -> None:
    if PICTURES:
        visit.page.screenshot(path=str(Path(PICTURES) / f"{name}.png"))


def test_an_image_is_sent_the_answer_streams_stops_and_outlives_a_reload(browser: Browser, site: Site) -> None:
    site.waits()
    with site.visit(browser) as visit:
        page = visit.page
        image = {"name": "cat.png", "mimeType": "image/png", "buffer": encoded(picture(200, 120))}
        page.set_input_files("#image-files", image)  # type: ignore[arg-type] # the stub wants a TypedDict
        page.wait_for_selector("#attachments img")
        send(visit, "What is it?")
        assert [item.kind for item in site.asked().media] == ["image"]
        assert "What is it?" in site.prompt()
        site.say("A **cat** that ")
        page.wait_for_selector(".streaming .prose strong:text('cat')")
        site.say("sleeps.")
        page.wait_for_selector(".streaming .prose p:has-text('A cat that sleeps.')")
        take_picture(visit, "streaming")
        page.click("#stop")
        site.engine.wait_for(Cancel, lambda cancel: cancel.request_id == site.asked().request_id)
        assert "Stopped" in wait_answered(visit).locator(".stats").inner_text()
        assert page.is_visible("#send") and page.is_hidden("#stop")
        before = page.inner_text("#messages")
        page.reload()
        page.wait_for_selector(".assistant .prose strong")
        assert page.inner_text("#messages") == before
        assert page.locator(".user img").evaluate("image => image.naturalWidth") == 200
        assert page.locator(".chat-entry").count() == 1
        assert all(url.startswith((site.server.url, "data:")) for url in visit.requests), "a request to another host"


def test_a_reload_in_the_middle_keeps_what_was_said(browser: Browser, site: Site) -> None:
    site.waits()
    with site.visit(browser) as visit:
        send(visit, "Go")
        site.say("First words.")
        visit.page.wait_for_selector(".streaming .prose:has-text('First words.')")
        # The page keeps a running answer every 0.7 s, with the chunk that comes after.
        visit.page.wait_for_timeout(800)
        site.say(" More.")
        visit.page.wait_for_selector(".streaming .prose:has-text('More.')")
        visit.page.reload()
        assert "First words. More." in wait_answered(visit).inner_text()
        site.engine.wait_for(Cancel)


def test_thinking_and_calls_are_shown_and_results_go_back(browser: Browser, site: Site) -> None:
    call = (
        '<think>I need it.</think>One moment.<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'
    )
    site.answers(call, "It is **cold**.")
    with site.visit(browser) as visit:
        page = visit.page
        page.click("#open-settings")
        page.fill("[name=tools]", "{")
        assert page.is_visible("#tools-error")
        page.fill("[name=tools]", json.dumps(TOOLS))
        assert page.is_hidden("#tools-error")
        page.keyboard.press("Escape")
        send(visit, "How is Oslo?")
        answer = wait_answered(visit)
        assert '"name": "weather"' in site.prompt()
        assert answer.locator(".thinking").get_attribute("open") is None, "closed once the answer begins"
        answer.locator("summary").click()
        assert answer.locator(".thought").inner_text() == "I need it."
        assert answer.locator(".prose").inner_text() == "One moment."
        assert json.loads(answer.locator(".call pre").inner_text()) == {"city": "Oslo"}
        answer.locator("textarea").fill("-12 °C")
        take_picture(visit, "call")
        answer.get_by_role("button", name="Send result").click()
        assert wait_answered(visit, 2).locator(".prose").inner_text() == "It is cold."
        assert "[call weather]" in site.prompt() and "tool\n-12 °C" in site.prompt()
        page.reload()
        page.wait_for_selector(".tool")
        assert page.locator(".assistant textarea").count() == 0, "that call is answered"


def test_tokens_are_coloured_and_counted_by_where_they_came_from(browser: Browser, site: Site) -> None:
    site.waits()
    with site.visit(browser) as visit:
        page = visit.page
        page.keyboard.press("Alt+t")
        send(visit, "Go")
        site.say("1234567")  # as long as "<think>", so it is no reasoning
        site.say("bcd", Verified(drafter="ngram", num_draft_tokens=4, num_accepted=2))
        page.wait_for_selector(".o-ngram:text-is('c')")
        live = last_answer(visit)
        assert "50% accepted" in live.locator(".stats").inner_text(), "while it streams"
        site.say("efgh", Verified(drafter="eagle3", num_draft_tokens=4, num_accepted=3))
        site.say("ij", Verified(drafter="some-new-kind", num_draft_tokens=1, num_accepted=1), "length")
        answer = wait_answered(visit)
        kinds = answer.locator(".tokens .token").evaluate_all("all => all.map(t => [t.textContent, t.className])")
        expected = [*["target"] * 7, "ngram", "ngram", "target", *["eagle3"] * 3, "target", "model", "target"]
        text = "1234567bcdefghij"
        assert kinds == [[text, f"token o-{kind}"] for text, kind in zip(text, expected, strict=True)]
        legend = re.sub(r"\s+", " ", answer.locator(".legend").inner_text())
        assert legend == "Target 10 63% n-gram 2 13% EAGLE-3 3 19% some-new-kind 1 6%"
        take_picture(visit, "tokens")
        assert page.is_hidden(".assistant .prose")
        page.set_viewport_size({"width": 1280, "height": 220})
        page.locator("#scroller").evaluate("area => area.scrollTo(0, 0)")
        page.wait_for_selector("#to-end", state="visible")
        page.set_viewport_size({"width": 1280, "height": 860})
        page.click("#view-text")
        assert page.is_visible(".assistant .prose") and page.is_hidden(".token-view")
        page.wait_for_selector("#to-end", state="hidden")  # all of it can be seen
        page.reload()
        page.wait_for_selector(".assistant .prose:has-text('1234567bcdefghij')")
        assert page.locator(".assistant .token").count() == 16


def test_settings_reach_the_engine_and_are_kept(browser: Browser, site: Site) -> None:
    site.answers("one", "two")
    with site.visit(browser) as visit:
        page = visit.page
        send(visit, "plain")
        wait_answered(visit)
        assert (site.submits[0].sampling.is_seeded, site.submits[0].sampling.top_k) == (False, 0), "the model's own"
        page.keyboard.press("Alt+Comma")
        values = {
            "temperature": "0.3",
            "top_k": "7",
            "min_p": "0.05",
            "seed": "11",
            "max_tokens": "9",
            "system": "Be kind",
        }
        for name, value in values.items():
            page.fill(f"[name={name}]", value)
        page.keyboard.press("Escape")
        page.reload()
        page.wait_for_selector(".assistant")
        send(visit, "set")
        wait_answered(visit, 2)
        submit = site.submits[1]
        sampling = submit.sampling
        assert (sampling.temperature, sampling.top_k, sampling.min_p) == (0.3, 7, 0.05)
        assert (sampling.seed, sampling.is_seeded, submit.max_tokens) == (11, True, 9)
        assert site.prompt().startswith("<|im_start|>system\nBe kind")


def test_an_adapter_can_be_chosen_and_stays_chosen(browser: Browser, start_site: Callable[..., Site]) -> None:
    site = start_site(adapters="sql=./sql-lora,tone=./tone-lora")
    site.answers("one", "two", "three")
    with site.visit(browser) as visit:
        page = visit.page
        send(visit, "Hi")
        wait_answered(visit)
        page.click("#open-settings")
        assert page.locator("[name=model] option").all_inner_texts() == ["Fake-1B", "sql", "tone"]
        page.select_option("[name=model]", "sql")
        page.keyboard.press("Escape")
        assert page.inner_text("#model-name") == "sql"
        send(visit, "Hi")
        wait_answered(visit, 2)
        page.reload()
        page.wait_for_selector("#model-name:text-is('sql')")
        send(visit, "Hi")
        wait_answered(visit, 3)
    assert [submit.adapter for submit in site.submits] == ["", "sql", "sql"]


def test_a_server_with_keys_is_usable_once_the_key_is_known(browser: Browser, start_site: Callable[..., Site]) -> None:
    site = start_site(api_keys="secret-key")
    site.answers("welcome")
    with Visit(browser, expected="401") as visit:  # the browser tells of the refused call
        page = visit.page
        page.goto(f"{site.server.url}/ui")
        page.wait_for_selector("#model-state[data-state=locked]")
        page.click("#open-settings")
        page.fill("[name=api_key]", "secret-key")
        page.press("[name=api_key]", "Tab")
        page.wait_for_selector("#model-state[data-state=ready]")
        page.keyboard.press("Escape")
        send(visit, "Hi")
        assert wait_answered(visit).locator(".prose").inner_text() == "welcome"
        kept = "() => [localStorage, sessionStorage].map(store => JSON.stringify({ ...store }).includes('secret-key'))"
        assert page.evaluate(kept) == [False, True], "for this tab only"
        page.click("#open-settings")
        page.check("[name=remember_key]")
        assert page.evaluate(kept) == [True, False]


def test_answers_are_repeated_deleted_and_questions_changed(browser: Browser, site: Site) -> None:
    site.answers("first", "second", "third")
    with site.visit(browser) as visit:
        page = visit.page
        send(visit, "question")
        wait_answered(visit).get_by_role("button", name="Answer again").click()
        page.wait_for_selector(".prose:has-text('second')")
        wait_answered(visit)
        assert page.locator(".prose").all_inner_texts() == ["second"]
        assert site.prompt(0) == site.prompt(1), "the first answer is not a part of it"
        page.hover(".user")
        page.get_by_role("button", name="Edit and send again").click()
        assert page.input_value("#prompt") == "question"
        page.keyboard.press("Escape")
        assert page.input_value("#prompt") == ""
        page.get_by_role("button", name="Edit and send again").click()
        send(visit, "better question")
        page.wait_for_selector(".prose:has-text('third')")
        wait_answered(visit)
        assert page.locator(".user").count() == 1 and "better question" in site.prompt()
        page.keyboard.press("Alt+n")
        assert page.is_visible("#welcome")
        page.click(".chat-entry .open")
        page.hover(".user")
        page.get_by_role("button", name="Delete message and answer").click()
        page.wait_for_function("() => document.querySelectorAll('.chat-entry').length == 0")
        page.reload()
        page.wait_for_selector("#welcome:visible")


def test_keys_of_the_composer(browser: Browser, site: Site) -> None:
    site.waits()
    with site.visit(browser) as visit:
        page = visit.page
        page.click("header")
        page.keyboard.press("/")
        page.keyboard.type("one")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("two")
        page.keyboard.press("Enter")
        assert "one\ntwo" in (site.asked() and site.prompt())
        page.keyboard.press("Escape")
        site.engine.wait_for(Cancel)
        wait_answered(visit)


def test_a_failed_request_says_why_where_the_answer_would_be(browser: Browser, site: Site) -> None:
    site.waits()
    with site.visit(browser) as visit:
        send(visit, "Go")
        site.say("Half an")
        visit.page.wait_for_selector(".streaming .prose:has-text('Half an')")
        site.engine.send_output(site.asked().request_id, [], finish_reason="error", error="the row failed")
        answer = wait_answered(visit)
        assert answer.locator(".error").inner_text() == "the row failed"
        assert "Half an" in answer.inner_text()


LONG = "https://example.org/" + "a" * 300
WIDE = (
    f"{LONG}\n\n`{'x' * 200}`\n\n```\n{'y' * 400}\n```\n\n|{'h|' * 30}\n|{'-|' * 30}\n|{'c|' * 30}\n\n# {'W' * 120}\n"
)


def test_nothing_is_wider_than_a_phone(browser: Browser, site: Site) -> None:
    site.answers(WIDE + ANSWER, chunk=50)
    with site.visit(browser, width=390, height=844, has_touch=True) as visit:
        page = visit.page
        image = {"name": "wide.png", "mimeType": "image/png", "buffer": encoded(picture(900, 60))}
        page.set_input_files("#image-files", image)  # type: ignore[arg-type] # the stub wants a TypedDict
        page.fill("#prompt", "w" * 300)
        page.keyboard.press("Enter")
        assert page.locator(".user").count() == 0, "a phone's Enter is a new line"
        page.click("#send")
        wait_answered(visit)
        assert visit.overflow() == 0
        page.click("#view-tokens")
        assert visit.overflow() == 0
        take_picture(visit, "phone-tokens")
        page.click("#open-sidebar")
        page.wait_for_function("() => document.querySelector('#sidebar').getBoundingClientRect().left == 0")
        take_picture(visit, "phone-chats")
        page.click("#backdrop", position={"x": 380, "y": 400})
        page.click("#open-settings")
        assert visit.overflow() == 0
        take_picture(visit, "phone-settings")


GROUNDS = ("paper", "side", "sunk", "pressed", "bubble", "amber", "rose", "blue", "violet", "green", "aqua")


def contrast(one: list[float], other: list[float]) -> float:
    """WCAG's ratio of two sRGB colours."""

    def luminance(colour: list[float]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour[:3])]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_texts_and_token_colours_can_be_read(quiet: Visit) -> None:
    for theme, paper in (("light", [255, 255, 255]), ("dark", [20, 24, 26])):
        quiet.page.emulate_media(color_scheme=theme)  # type: ignore[arg-type] # one of two literals
        colours = quiet.page.evaluate(
            """names => Object.fromEntries(names.map(name => {
                const probe = document.createElement("i");
                probe.style.color = `var(--${name})`;
                document.body.append(probe);
                return [name, getComputedStyle(probe).color.match(/[\\d.]+/g).map(Number)];
            }))""",
            [*GROUNDS, "ink", "soft", "faint", "accent", "on-accent", "danger", "danger-ground"],
        )
        assert colours["paper"] == paper
        for ground in GROUNDS:
            assert contrast(colours["ink"], colours[ground]) >= 7, f"{theme}: ink on {ground}"
        for front, ground in (("soft", "paper"), ("soft", "sunk"), ("faint", "paper"), ("accent", "paper"),
                              ("on-accent", "accent"), ("danger", "danger-ground")):  # fmt: skip
            assert contrast(colours[front], colours[ground]) >= 4.5, f"{theme}: {front} on {ground}"


def test_markdown_becomes_elements_also_piece_by_piece(quiet: Visit) -> None:
    got = quiet.page.evaluate(
        """async texts => {
            const { render } = await import("./markdown.js");
            const plain = (place) => {
                const copy = place.cloneNode(true);
                for (const head of copy.querySelectorAll(".code-head")) head.remove();
                for (const box of copy.querySelectorAll("[tabindex]")) box.removeAttribute("tabindex");
                for (const box of copy.querySelectorAll("div")) box.replaceWith(...box.childNodes);
                return copy.innerHTML;
            };
            return texts.map(text => {
                const whole = document.createElement("div");
                render(whole, text);
                const grown = document.createElement("div");
                for (let end = 0; end <= text.length; end++) render(grown, text.slice(0, end));
                return [plain(whole), plain(grown)];
            });
        }""",
        [text for text, _ in CASES.values()],
    )
    for (name, (_, expected)), (whole, grown) in zip(CASES.items(), got, strict=True):
        assert whole == expected, name
        assert grown == expected, f"{name}, piece by piece"


HOSTILE = {
    "stars": "*a " * 20_000,
    "brackets": "[" * 20_000,
    "deep quotes": ">" * 5_000 + "a",
    "deep lists": "".join("  " * i + "- a\n" for i in range(300)),
    "ticks": "`" * 20_000 + "a",
    "table": "|" * 5_000 + "\n" + "|-" * 5_000,
    "spaces": "#" + " " * 20_000 + "a",
    "underscores": "_a" * 20_000,
    "links": "[a](" * 5_000,
}


def test_no_text_makes_the_page_hang(quiet: Visit) -> None:
    script = """async text => {
        const { render } = await import("./markdown.js");
        const start = performance.now();
        const place = document.createElement("div");
        render(place, text);
        return [(performance.now() - start) / 1000, place.textContent.length];
    }"""
    for name, text in HOSTILE.items():
        seconds, length = quiet.page.evaluate(script, text)
        assert seconds < 3.0, f"{name}, a busy machine included"
        assert length > 0, name


def test_a_clip_is_sent_as_the_api_takes_it(quiet: Visit) -> None:
    wav = b"RIFF" + bytes(60)
    got = quiet.page.evaluate(
        """async bytes => {
            const { attachment, contentPart } = await import("./attachments.js");
            const file = new File([Uint8Array.from(bytes)], "clip.wav", { type: "audio/wav" });
            const refused = await attachment(file, ["text", "image"]).catch(error => error.message);
            return [contentPart(await attachment(file, ["text", "audio"])), refused];
        }""",
        list(wav),
    )
    assert got[0] == {
        "type": "input_audio",
        "input_audio": {"data": base64.b64encode(wav).decode(), "format": "wav"},
    }
    assert got[1] == "clip.wav: this model takes no audio."
