"""The browser as attacker: other sites' pages, names that are rebound to this machine, and keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from rvllm.api.http.browsers import allowed_hosts
from rvllm.api.http.keys import load_keys
from rvllm.config import ServerConfig
from rvllm.errors import UsageError
from rvllm.settings import build
from support.clients.attacker import Server, raw, statuses
from support.doubles.server import LiveServer

ASK = {"prompt": "a", "max_tokens": 1}
FOREIGN_HOSTS = [
    "evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.1",
    "0.0.0.0", "localhost@evil.example", "[::2]", "", "localhost/", "xn--lcalhost-54a",
]  # fmt: skip
OWN_HOSTS = [
    "localhost",
    "LOCALHOST:8000",
    "127.0.0.1",
    "127.1.2.3:80",
    "[::1]:8000",
    "app.localhost",
    "localhost.",
]


@pytest.mark.parametrize("host", FOREIGN_HOSTS)
def test_a_rebound_name_reaches_nothing(server: Server, host: str) -> None:
    for path in ("/health", "/v1/models", "/", "/rvllm/state", "/nothing"):
        assert server.get(path, Host=host)[0] == 403
    assert server.ask("POST", "/v1/completions", ASK, Host=host)[0] == 403


@pytest.mark.parametrize("host", OWN_HOSTS)
def test_this_machines_names_are_taken(server: Server, host: str) -> None:
    assert server.get("/health", Host=host)[0] == 200


BENT_HOSTS = [
    "localhost/health?",
    "x/v1/models#",
    "x?y",
    "a@b",
    "[",
    "a]b",
    "a b",
    "x\\\\y",
    "[::1",
    "\xe9",
    "a:b",
]


@pytest.mark.parametrize("host", BENT_HOSTS)
def test_no_host_bends_the_path(keyed: LiveServer, host: str) -> None:
    """CVE-2026-48746: with a path in it, a check by the URL looks at another path than the router."""
    for path in (b"/v1/models", b"/health", b"/nothing"):
        ask = b"GET %b HTTP/1.1\r\nHost: %b\r\nConnection: close\r\n\r\n" % (path, host.encode("latin-1"))
        assert statuses(raw(keyed.port, ask)) == [400]
    for fine in (b"example.org", b"a_b.c:8000", b"[::1]:80", b""):
        ask = b"GET /v1/models HTTP/1.1\r\nHost: %b\r\nConnection: close\r\n\r\n" % fine
        assert statuses(raw(keyed.port, ask)) == [401]


@pytest.fixture(scope="module")
def keyed() -> Iterator[LiveServer]:
    with LiveServer(api_key="secret") as live:
        yield live


FOREIGN_PAGES = [
    {"Origin": "https://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://localhost:1"},
    {"Origin": "http://localhost.evil.example"},
    {"Sec_Fetch_Site": "cross-site"},
    {"Sec_Fetch_Site": "same-site"},
    {"Origin": "http://127.0.0.1", "Sec_Fetch_Site": "cross-site"},
]


@pytest.mark.parametrize("page", FOREIGN_PAGES, ids=str)
@pytest.mark.parametrize("kind", ["application/json", "text/plain", "multipart/form-data; boundary=a", ""])
def test_another_sites_page_changes_nothing(server: Server, page: dict[str, str], kind: str) -> None:
    """Forms, sendBeacon and fetch without reading are sent without asking the server."""
    headers = {**page, "Content_Type": kind}
    for method, path in (("POST", "/v1/completions"), ("POST", "/v1/files"), ("DELETE", "/v1/files/x")):
        assert server.ask(method, path, ASK, **headers)[0] == 403


def test_its_own_page_and_other_programs_are_served(server: Server) -> None:
    own = f"127.0.0.1:{server.port}"
    for headers in (
        {},
        {"Origin": f"http://{own}"},
        {"Sec_Fetch_Site": "same-origin"},
        {"Sec_Fetch_Site": "none"},
    ):
        assert server.ask("POST", "/v1/completions", ASK, **headers)[0] == 200


@pytest.mark.parametrize("key", ["none", "None", "auto", "null", "0", "false", "a b", "schlüssel", "日本"])
def test_a_key_is_any_text(key: str) -> None:
    for config in (
        build(ServerConfig, {"api_key": key}, {}),
        build(ServerConfig, {}, {"RVLLM_API_KEY": key}),
    ):
        keys = load_keys(config)
        assert keys and keys.accept(key.encode())
        for other in (b"", b"x", key.encode()[:-1], key.encode() + b"x"):
            assert not keys.accept(other)


@pytest.mark.parametrize("key", ["", " ", " a", "a\n", "a\0b"])
def test_a_key_that_cannot_be_meant_is_refused(key: str) -> None:
    with pytest.raises(UsageError, match=r"api-key|RVLLM_API_KEY"):
        load_keys(build(ServerConfig, {"api_key": key}, {}))
    with pytest.raises(UsageError, match=r"api-key|RVLLM_API_KEY"):
        load_keys(build(ServerConfig, {}, {"RVLLM_API_KEY": key}))


def test_several_keys_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("first\r\nnone\n\nthe third one\n")
    keys = load_keys(ServerConfig(api_key="given", api_key_file=str(file)))
    assert all(keys.accept(key) for key in (b"first", b"none", b"the third one", b"given"))
    assert not keys.accept(b"") and not keys.accept(b"first\r")
    for content in (b"", b"\n\n", b"\xff\xfe"):
        file.write_bytes(content)
        with pytest.raises(UsageError, match="api-key-file"):
            load_keys(ServerConfig(api_key_file=str(file)))


@pytest.mark.parametrize(
    ("host", "names"), [("127.0.0.1", frozenset()), ("::1", frozenset()), ("0.0.0.0", None)]
)
def test_which_hosts_are_taken_by_default(host: str, names: frozenset[str] | None) -> None:
    config = ServerConfig(host=host)
    assert allowed_hosts(config) == names
    assert allowed_hosts(dataclasses.replace(config, allowed_hosts="*")) is None
    assert allowed_hosts(dataclasses.replace(config, allowed_hosts="A.example, b")) == {"a.example", "b"}
