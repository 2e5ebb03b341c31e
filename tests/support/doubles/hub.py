"""A package index and a model hub on 127.0.0.1, as small as the clients allow."""

import contextlib
import hashlib
import json
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.server.owner.answer(self, unquote(urlsplit(self.path).path))  # type: ignore[attr-defined]

    do_HEAD = do_GET

    def send(self, status: int, body: bytes, pause: float = 0.0, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        with contextlib.suppress(OSError):
            for start in range(0, len(body), 1 << 14):
                self.wfile.write(body[start : start + (1 << 14)])
                time.sleep(pause)


class LocalServer:
    def __init__(self) -> None:
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self.http.daemon_threads = True
        self.http.owner = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.log: list[tuple[str, str]] = []

    def answer(self, handler: _Handler, path: str) -> None:
        self.log.append((handler.command, path))
        self.respond(handler, path)

    def respond(self, handler: _Handler, path: str) -> None:
        raise AssertionError("a server answers")

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        thread = Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield
        finally:
            self.http.shutdown()
            self.http.server_close()
            thread.join()


class PackageIndex(LocalServer):
    """A simple index (PEP 503) of the wheels in a folder. pause: seconds after every 16 KiB of a wheel."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.pause = 0.0

    def respond(self, handler: _Handler, path: str) -> None:
        room, _, name = path.strip("/").partition("/")
        if room == "simple":
            wheels = [w.name for w in self.folder.glob(f"{name.replace('-', '_')}-*.whl")]
            links = "".join(f'<a href="/files/{w}">{w}</a>' for w in wheels)
            handler.send(200 if wheels else 404, links.encode(), Content_Type="text/html")
        else:
            handler.send(200, (self.folder / name).read_bytes(), self.pause)

    def downloads(self) -> int:
        return sum(method == "GET" and path.startswith("/files/") for method, path in self.log)


def write_wheel(folder: Path, name: str, members: dict[str, bytes], version: str = "1.0") -> Path:
    """A wheel that holds files and the metadata pip asks for."""
    info = f"{name}-{version}.dist-info"
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in members.items():
            archive.writestr(member, data)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


class Hub(LocalServer):
    """A model hub: repos[name][revision] is (commit, files); `tokens` guards private names."""

    def __init__(self) -> None:
        super().__init__()
        self.repos: dict[str, dict[str, tuple[str, dict[str, bytes]]]] = {}
        self.private: dict[str, str] = {}
        self.gated: set[str] = set()

    def add(self, repo: str, files: dict[str, bytes], revision: str = "main") -> str:
        commit = hashlib.sha1(f"{repo}{revision}{sorted(files)}".encode()).hexdigest()
        self.repos.setdefault(repo, {})[revision] = (commit, files)
        return commit

    def refuse(self, handler: _Handler, status: int, code: str) -> None:
        handler.send(status, b'{"error": "no"}', X_Error_Code=code, X_Error_Message=code)

    def respond(self, handler: _Handler, path: str) -> None:
        parts = path.strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        if api:
            parts = parts[2:]
        repo, rest = "/".join(parts[:2]), parts[2:]
        token = self.private.get(repo)
        if repo not in self.repos or (token and handler.headers.get("Authorization") != f"Bearer {token}"):
            self.refuse(handler, 401, "RepoNotFound")
        elif repo in self.gated and handler.headers.get("Authorization") is None:
            self.refuse(handler, 403, "GatedRepo")
        else:
            revisions = self.repos[repo]
            wanted = rest[1] if len(rest) > 1 else "main"
            found = revisions.get(wanted) or next((r for r in revisions.values() if r[0] == wanted), None)
            if found is None:
                self.refuse(handler, 404, "RevisionNotFound")
            elif api:
                self.describe(handler, repo, *found, tree=rest[:1] == ["tree"])
            else:
                self.give(handler, "/".join(rest[2:]), *found)

    def describe(
        self, handler: _Handler, repo: str, commit: str, files: dict[str, bytes], tree: bool
    ) -> None:
        answer: Any = {
            "id": repo,
            "sha": commit,
            "siblings": [{"rfilename": n, "size": len(d)} for n, d in files.items()],
        }
        if tree:
            answer = [
                {"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                for n, d in files.items()
            ]
        handler.send(200, json.dumps(answer).encode(), Content_Type="application/json")

    def give(self, handler: _Handler, name: str, commit: str, files: dict[str, bytes]) -> None:
        if name not in files:
            self.refuse(handler, 404, "EntryNotFound")
            return
        tag = f'"{hashlib.sha1(files[name]).hexdigest()}"'
        handler.send(200, files[name], ETag=tag, X_Repo_Commit=commit, Accept_Ranges="bytes")

    def given(self) -> set[str]:
        """Names of the files that were downloaded."""
        return {
            path.partition("/resolve/")[2].partition("/")[2]
            for method, path in self.log
            if method == "GET" and "/resolve/" in path
        }
