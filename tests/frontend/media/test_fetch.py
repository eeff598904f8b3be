"""Ways to have a server connect where it should not: all refused, and what may be fetched is fetched."""

from __future__ import annotations

import asyncio
import http.server
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from frontend.media.addresses import is_public, parse_allowed
from frontend.media.fetch import MAX_REDIRECTS, fetch
from shared.config import Settings
from shared.errors import BadConfig, InvalidRequest

PUBLIC = "93.184.215.14"
ZONE = {"public.test": [PUBLIC], "localhost": ["127.0.0.1", "::1"], "internal.test": ["10.0.0.5"]}


class Web(http.server.BaseHTTPRequestHandler):
    """Answers on one loopback address; `seen` is every request that arrived."""

    protocol_version = "HTTP/1.1"
    seen: list[tuple[str, str, str]]
    answers: dict[str, tuple[int, dict[str, str], bytes]]

    def do_GET(self) -> None:
        self.seen.append((str(self.connection.getsockname()[0]), self.headers["host"], self.path))
        status, headers, content = self.answers.get(self.path, (200, {}, b"picture"))
        self.send_response(status)
        for name, value in ({"content-length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def web() -> Iterator[tuple[type[Web], int]]:
    """A web server on every loopback address: 127.0.0.1 is allowed by the tests, 127.0.0.2 must stay closed."""
    handler = type("Handler", (Web,), {"seen": [], "answers": {}})
    server = http.server.ThreadingHTTPServer(("0.0.0.0", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield handler, server.server_address[1]
    server.shutdown()
    server.server_close()
    thread.join(10)


def resolver(zone: dict[str, list[str]]) -> Callable[[str, int], object]:
    async def resolve(host: str, port: int) -> Sequence[str]:
        if host not in zone:
            raise OSError(f"no such host: {host}")
        return zone[host]

    return resolve


def get(url: str, zone: dict[str, list[str]] | None = None, **settings: object) -> bytes:
    chosen = Settings(**({"allow_media_urls": True, "media_timeout_s": 5.0} | settings))  # type: ignore[arg-type]
    return asyncio.run(fetch(url, chosen, resolve=resolver(ZONE | (zone or {}))))  # type: ignore[arg-type]


# Public hosts are allowed in all of these.
TRICKS = {
    "loopback": "http://127.0.0.1/",
    "loopback elsewhere": "http://127.8.9.10/",
    "loopback by name": "http://localhost/",
    "loopback by name with a dot": "http://localhost./",
    "this host": "http://0.0.0.0/",
    "short form": "http://127.1/",
    "decimal": "http://2130706433/",
    "hexadecimal": "http://0x7f000001/",
    "hexadecimal parts": "http://0x7f.0x0.0x0.0x1/",
    "octal": "http://017700000001/",
    "octal parts": "http://0177.0.0.1/",
    "leading zeros": "http://127.000.000.001/",
    "mixed bases": "http://0x7f.1/",
    "too large a number": "http://4294967297/",
    "number with a dot": "http://2130706433./",
    "private 10": "http://10.1.2.3/",
    "private 172.16": "http://172.16.0.1/",
    "private 192.168": "http://192.168.1.1/",
    "private by name": "http://internal.test/",
    "carrier-grade NAT": "http://100.64.0.1/",
    "link-local": "http://169.254.1.1/",
    "metadata (AWS, GCP, Azure)": "http://169.254.169.254/latest/meta-data/",
    "metadata (Alibaba)": "http://100.100.100.200/latest/meta-data/",
    "metadata (Oracle)": "http://192.0.0.192/opc/v2/",
    "metadata (Azure wire server)": "http://168.63.129.16/machine",
    "metadata (AWS, IPv6)": "http://[fd00:ec2::254]/",
    "multicast": "http://224.0.0.1/",
    "broadcast": "http://255.255.255.255/",
    "reserved": "http://240.0.0.1/",
    "benchmarking": "http://198.18.0.1/",
    "documentation": "http://192.0.2.1/",
    "6to4 relay": "http://192.88.99.1/",
    "IPv6 loopback": "http://[::1]/",
    "IPv6 unspecified": "http://[::]/",
    "IPv6 mapped": "http://[::ffff:127.0.0.1]/",
    "IPv6 mapped in hexadecimal": "http://[::ffff:7f00:1]/",
    "IPv6 mapped public": f"http://[::ffff:{PUBLIC}]/",
    "IPv6 compatible": "http://[::127.0.0.1]/",
    "6to4 of loopback": "http://[2002:7f00:1::]/",
    "NAT64 of loopback": "http://[64:ff9b::7f00:1]/",
    "local NAT64": "http://[64:ff9b:1::a00:1]/",
    "Teredo": "http://[2001:0:4136:e378:8000:63bf:3fff:fdd2]/",
    "ISATAP": "http://[2607:f8b0::5efe:127.0.0.1]/",
    "IPv6 link-local": "http://[fe80::1]/",
    "IPv6 zone": "http://[fe80::1%25eth0]/",
    "IPv6 unique local": "http://[fc00::1]/",
    "IPv6 site-local": "http://[fec0::1]/",
    "IPv6 multicast": "http://[ff02::1]/",
    "IPv6 documentation": "http://[2001:db8::1]/",
    "user info": "http://public.test@127.0.0.1/",
    "user info and password": "http://user:password@public.test/",
    "backslash": "http://public.test\\@127.0.0.1/",
    "fragment before at": "http://127.0.0.1#@public.test/",
    "escaped host": "http://%31%32%37.0.0.1/",
    "escaped at": "http://public.test%40127.0.0.1/",
    "full-width digits": "http://\uff11\uff12\uff17.0.0.1/",
    "circled digits": "http://\u2460\u2461\u2466.0.0.1/",
    "ideographic full stop": "http://127\u30020\u30020\u30021/",
    "line break": "http://public.test/\r\nX-Header: 1",
    "tab in the scheme": "ht\ttp://127.0.0.1/",
    "leading space": " http://127.0.0.1/",
    "null byte": "http://public.test\0.internal.test/",
    "other port": "http://public.test:6379/",
    "http on 443": "http://public.test:443/",
    "port 0": "http://public.test:0/",
    "empty port": "http://public.test:/",
    "no host": "http:///etc/passwd",
    "gopher": "gopher://127.0.0.1:6379/_FLUSHALL",
    "ftp": "ftp://public.test/",
    "dict": "dict://127.0.0.1:11211/stat",
    "jar": "jar:http://127.0.0.1!/",
    "netdoc": "netdoc:/etc/passwd",
    "no scheme": "//127.0.0.1/",
    "file": "file:///etc/passwd",
    "file with a host": "file://127.0.0.1/etc/passwd",
    "file in capitals": "FILE:///etc/passwd",
    "file with one slash": "file:/etc/passwd",
    "path": "/etc/passwd",
    "name that is private among others": "http://both.test/",
    "name that is mapped": "http://mapped.test/",
    "name without addresses": "http://empty.test/",
    "name that does not exist": "http://nowhere.test/",
}


def test_there_are_at_least_forty_tricks() -> None:
    assert len(set(TRICKS.values())) >= 40


@pytest.mark.parametrize("trick", TRICKS)
def test_trick_is_refused_without_a_connection(trick: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def connect(*_: object, **__: object) -> object:
        raise AssertionError("it connects")

    monkeypatch.setattr("anyio.connect_tcp", connect)
    zone = {"both.test": [PUBLIC, "10.0.0.1"], "mapped.test": ["::ffff:127.0.0.1"], "empty.test": []}
    with pytest.raises(InvalidRequest) as refusal:
        get(TRICKS[trick], zone)
    assert not any(secret in refusal.value.message for secret in ("10.0.0", "127.0.0", "root:"))


@pytest.mark.parametrize("url", ["http://public.test/", f"http://{PUBLIC}/", "https://public.test/x?y=1"])
def test_a_public_host_is_connected_to_by_its_checked_address(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    async def connect(remote_host: object, remote_port: object, **_: object) -> object:
        asked.append((remote_host, remote_port))
        raise OSError("no network here")

    monkeypatch.setattr("anyio.connect_tcp", connect)
    with pytest.raises(InvalidRequest, match="cannot be fetched"):
        get(url)
    assert asked == [(PUBLIC, 443 if url.startswith("https") else 80)]


def test_by_default_nothing_is_fetched() -> None:
    with pytest.raises(InvalidRequest, match="TANDEM_ALLOW_MEDIA_URLS"):
        get("http://public.test/", allow_media_urls=False)
    with pytest.raises(InvalidRequest, match="allowed folders"):
        get(__file__)


def test_a_listed_private_address_is_fetched_with_the_name_in_the_host_header(web: tuple[type[Web], int]) -> None:
    handler, port = web
    zone = {"pictures.test": ["127.0.0.1"]}
    url = f"http://pictures.test:{port}/a?b=c"
    assert get(url, zone, allow_media_urls=False, media_hosts="127.0.0.1/32") == b"picture"
    assert get(url, zone, allow_media_urls=False, media_hosts="Pictures.test") == b"picture"
    assert handler.seen == [("127.0.0.1", f"pictures.test:{port}", "/a?b=c")] * 2


def test_a_name_that_changes_its_address_after_the_check_gains_nothing(web: tuple[type[Web], int]) -> None:
    handler, port = web
    answers = iter([["127.0.0.1"], ["127.0.0.2"], ["127.0.0.2"]])
    num_asked = 0

    async def rebinding(host: str, asked_port: int) -> list[str]:
        nonlocal num_asked
        num_asked += 1
        return next(answers)

    settings = Settings(media_hosts="127.0.0.1/32", media_timeout_s=5.0)
    url = f"http://rebind.test:{port}/"
    assert asyncio.run(fetch(url, settings, resolve=rebinding)) == b"picture"
    assert num_asked == 1
    with pytest.raises(InvalidRequest):
        asyncio.run(fetch(url, settings, resolve=rebinding))
    assert [address for address, *_ in handler.seen] == ["127.0.0.1"]


@pytest.mark.parametrize(
    "location",
    [
        "http://127.0.0.2:{port}/secret",
        "//127.0.0.2:{port}/secret",
        "http://internal.test/",
        "http://2130706434:{port}/",
        "http://[::ffff:127.0.0.2]:{port}/",
        "http://pictures.test@127.0.0.2:{port}/",
        "file:///etc/passwd",
        "gopher://127.0.0.1:{port}/",
        "http://[bad",
    ],
)
def test_a_redirect_passes_the_same_checks(location: str, web: tuple[type[Web], int]) -> None:
    handler, port = web
    handler.answers["/"] = (302, {"location": location.format(port=port)}, b"")
    with pytest.raises(InvalidRequest):
        get(f"http://127.0.0.1:{port}/", media_hosts="127.0.0.1/32")
    assert [path for _, _, path in handler.seen] == ["/"]


def test_redirects_are_followed_so_far_and_no_further(web: tuple[type[Web], int]) -> None:
    handler, port = web
    for i in range(MAX_REDIRECTS + 1):
        handler.answers[f"/{i}"] = (307, {"location": f"/{i + 1}"}, b"")
    hosts = {"media_hosts": "127.0.0.1/32"}
    assert get(f"http://127.0.0.1:{port}/1", **hosts) == b"picture"
    with pytest.raises(InvalidRequest, match="redirects more than"):
        get(f"http://127.0.0.1:{port}/0", **hosts)


@pytest.mark.parametrize(
    ("status", "headers", "content", "reason"),
    [
        (200, {}, bytes(2001), "larger"),
        (200, {"content-length": "999999999"}, b"", "larger"),
        (200, {"content-length": "", "transfer-encoding": "chunked"}, b"7d1\r\n" + bytes(2001) + b"\r\n", "larger"),
        (200, {"content-encoding": "gzip"}, b"\x1f\x8b", "compressed"),
        (404, {}, b"", "404"),
        (200, {"content-length": "nine"}, b"", "cannot be fetched"),
    ],
)  # fmt: skip
def test_an_answer_beyond_the_limits_is_refused(
    status: int, headers: dict[str, str], content: bytes, reason: str, web: tuple[type[Web], int]
) -> None:
    handler, port = web
    handler.answers["/"] = (status, {k: v for k, v in headers.items() if v}, content)
    with pytest.raises(InvalidRequest, match=reason):
        get(f"http://127.0.0.1:{port}/", media_hosts="127.0.0.1/32", media_max_bytes=2000)


def test_a_host_that_never_answers_costs_its_time_limit_only() -> None:
    async def silent() -> None:
        async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nslow")
            await reader.read()  # until the client gives up
            writer.close()

        server = await asyncio.start_server(hold, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        settings = Settings(media_hosts="127.0.0.1/32", media_timeout_s=0.3)
        async with server:
            with pytest.raises(InvalidRequest, match=r"within 0\.3 s"):
                await fetch(f"http://127.0.0.1:{port}/", settings)

    asyncio.run(asyncio.wait_for(silent(), 20))


def test_files_come_from_allowed_folders_only(tmp_path: Path) -> None:
    root, secret = tmp_path / "root", tmp_path / "secret"
    (root / "inner").mkdir(parents=True)
    (root / "inner" / "a b.png").write_bytes(b"inside")
    secret.write_bytes(b"outside")
    (root / "link").symlink_to(secret)
    (root / "folder").symlink_to(tmp_path)
    (root / "good link").symlink_to(root / "inner" / "a b.png")
    (root / "loop").symlink_to(root / "loop")
    os.mkfifo(root / "pipe")
    roots = {"media_roots": f"{tmp_path / 'not there'},{root}"}
    for url in (f"{root}/inner/a b.png", f"file://{root}/inner/a%20b.png", f"file://localhost{root}/good%20link"):
        assert get(url, **roots) == b"inside"
    refused = [
        secret, root / "link", root / "folder" / "secret", root / "loop", root / "pipe", root / "inner", root,
        f"{root}/../secret", f"file://{root}/%2e%2e/secret", f"file://{root}/inner/a%00b", f"{root}-not/secret",
        f"file://{root}/missing", "/dev/zero", "/proc/self/environ",
    ]  # fmt: skip
    for path in refused:
        with pytest.raises(InvalidRequest) as refusal:
            get(str(path), **roots)
        assert refusal.value.message == "local files may be read from the server's allowed folders only"
    with pytest.raises(InvalidRequest, match="larger than 3 bytes"):
        get(f"{root}/inner/a b.png", media_max_bytes=3, **roots)


def test_hosts_that_are_none_stop_start_up() -> None:
    with pytest.raises(BadConfig, match="10/99"):
        parse_allowed(False, "pictures.test, 10/99")


def test_ordinary_addresses_are_public() -> None:
    import ipaddress

    for address in (PUBLIC, "8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "2a00:1450:4001:82f::200e"):
        assert is_public(ipaddress.ip_address(address))
