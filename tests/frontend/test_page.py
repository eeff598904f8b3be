"""The chat page's files as the server gives them; what it does in a browser is in test_page_browser.py."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from frontend.page.api import POLICY, read_files
from shared.config import Settings
from tests.frontend.conftest import RunningServer
from tests.support.fake_engine import FakeEngine

FILES = read_files()
SCRIPTS = {name: file.content.decode() for name, file in FILES.items() if name.endswith(".js")}


def test_the_page_is_served_with_its_policy(server: RunningServer) -> None:
    redirect = server.http.get("/ui")
    assert (redirect.status_code, redirect.headers["location"]) == (307, "ui/")
    page = server.http.get("/ui", follow_redirects=True)
    assert page.url.path == "/ui/"
    assert page.headers["content-type"].startswith("text/html")
    assert page.headers["content-security-policy"] == POLICY
    assert page.headers["x-content-type-options"] == "nosniff"
    for name in re.findall(r'(?:src|href)="([^#"]+)"', page.text):
        assert server.http.get(f"/ui/{name}").status_code == 200, name


@pytest.mark.parametrize("name", FILES)
def test_each_file_has_its_type_and_is_not_sent_twice(server: RunningServer, name: str) -> None:
    first = server.http.get(f"/ui/{name}")
    kinds = {"js": "text/javascript", "css": "text/css", "html": "text/html", "svg": "image/svg+xml"}
    assert first.headers["content-type"].partition(";")[0] == kinds[name.rpartition(".")[2]]
    again = server.http.get(f"/ui/{name}", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert server.http.head(f"/ui/{name}").headers["content-length"] == str(len(first.content))


@pytest.mark.parametrize("path", ["/ui/nothing.js", "/ui/../app.py", "/ui/%2e%2e/api.py", "/ui/a/b"])
def test_no_other_file_is_served(server: RunningServer, path: str) -> None:
    assert server.http.get(path).status_code == 404


def test_the_page_needs_no_key_and_what_it_calls_does(
    engine: FakeEngine, start_server: Callable[..., RunningServer], settings: Settings
) -> None:
    running = start_server(settings=msgspec.structs.replace(settings, api_keys="secret"))
    assert running.http.get("/ui/app.js").status_code == 200
    assert running.http.get("/v1/models").status_code == 401
    assert running.http.get("/uix").status_code == 401


def test_a_setting_switches_it_off(
    engine: FakeEngine, start_server: Callable[..., RunningServer], settings: Settings
) -> None:
    running = start_server(settings=msgspec.structs.replace(settings, ui=False))
    assert [running.http.get(path).status_code for path in ("/ui", "/ui/", "/ui/app.js")] == [404] * 3


def test_texts_never_become_markup_or_code() -> None:
    for name, script in SCRIPTS.items():
        for word in (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "DOMParser",
            "eval(",
            "Function(",
        ):
            assert word not in script, f"{name} uses {word}"


def test_nothing_names_another_host() -> None:
    for name, file in FILES.items():
        addresses = set(re.findall(rb"https?://[\w.-]+", file.content))
        assert addresses <= {b"http://www.w3.org"}, f"{name}: {addresses}"  # a name space, not an address


def test_every_import_is_a_file_of_the_page() -> None:
    for name, script in SCRIPTS.items():
        for other in re.findall(r'from "\./([^"]+)"', script):
            assert other in FILES, f"{name} imports {other}"


def test_an_installed_package_holds_the_page() -> None:
    """`static/*` of pyproject.toml matches files only in that one folder."""
    folder = Path(__file__).parents[2] / "frontend" / "page" / "static"
    assert {path.name for path in folder.rglob("*")} == set(FILES)
    assert '"frontend.page" = ["static/*"]' in (folder.parents[2] / "pyproject.toml").read_text()
