"""What every client needs: a server of a model that the tests use, and an installation of its own."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent


class UnavailableError(Exception):
    """A client cannot be had: no node, no network."""


def fetched(name: str) -> Path:
    """A model that the tests use, fetched if need be."""
    spec = importlib.util.spec_from_file_location("fetch_test_models", HERE.parent / "fetch_test_models.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    path: Path = module.fetch(name)
    return path


@contextmanager
def served(model: Path, name: str, work: Path, *flags: str) -> Iterator[str]:
    """The URL of a server of this model, on a free port; it ends with the block."""
    log = work / f"serve-{name}.log"
    command = [sys.executable, "-m", "rvllm", "serve", "--model", str(model), "--served-model-name", name]
    command += ["--worker-timeout", "60"]  # a busy machine takes its time with the first grammar
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, "--device", "cpu", "--port", "0", *flags], stdout=out, stderr=subprocess.STDOUT
        )
    try:
        until, found = time.monotonic() + 180, None
        while found is None:
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"the server did not start:\n{log.read_text()}")
            found = re.search(r"listening on (http://127\.0\.0\.1:\d+)", log.read_text())
            time.sleep(0.05)
        yield found[1]
        if process.poll() is not None:
            raise SystemExit(f"the server ended:\n{log.read_text()[-4000:]}")
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def listening(
    command: Sequence[str | Path], folder: str | Path, variables: Mapping[str, str], path: str = "/health"
) -> Iterator[str]:
    """The URL of somebody else's server, run with `--port`, once it answers `path`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = Path(folder) / "server.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [*map(str, command), "--port", str(port)],
            cwd=folder, env={**os.environ, **variables}, stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip
    url, until = f"http://127.0.0.1:{port}", time.monotonic() + 600
    try:
        while not _answers(url + path):
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"{command[0]} did not start:\n{log.read_text()[-4000:]}")
            time.sleep(1)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def ran(
    command: Sequence[str | Path],
    folder: Path,
    seconds: float = 900,
    variables: Mapping[str, str] | None = None,
) -> bool:
    """Runs a client, its output going where ours goes. False when it fails or hangs.

    What it caches goes to a folder that is gone after it, never beside the scripts.
    """
    print("$", " ".join(str(part).replace(str(folder.parent), "...") for part in command), flush=True)
    with tempfile.TemporaryDirectory() as cache:
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": cache}
        environment = {**os.environ, **offline, **(variables or {})}
        try:
            code = subprocess.run(command, check=False, cwd=folder, env=environment, timeout=seconds)
        except subprocess.TimeoutExpired:
            print(f"did not end within {seconds:g} s")
            return False
        return code.returncode == 0


def installed(work: Path, name: str, *packages: str) -> Path:
    """The programs' folder of a virtual environment with these packages."""
    folder = work / name
    if not (folder / "done").exists():
        pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", *packages]
        for command in ([sys.executable, "-m", "venv", str(folder)], pip):
            if subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode:
                raise UnavailableError(f"{' '.join(packages)} could not be installed")
        (folder / "done").touch()
    return folder / "bin"


def npm_installed(work: Path, name: str, package: str) -> Path:
    """The folder of an npm package."""
    if not (shutil.which("node") and shutil.which("npm")):
        raise UnavailableError("node and npm are not installed")
    folder = work / name
    folder.mkdir(exist_ok=True)
    if not (folder / "done").exists():
        (folder / "package.json").write_text("{}")
        command = ["npm", "install", "--silent", "--no-audit", "--no-fund", package]
        if subprocess.run(command, check=False, cwd=folder, stdout=subprocess.DEVNULL).returncode:
            raise UnavailableError(f"npm could not install {package}")
        (folder / "done").touch()
    return folder


@contextmanager
def both(work: Path) -> Iterator[tuple[str, str, str, str]]:
    """Qwen2.5-Coder-0.5B and MiniLM: (URL, model, URL, encoder)."""
    with (
        served(fetched("qwen2.5-coder-0.5b"), "qwen", work, "--max-model-len", "4096") as url,
        served(fetched("minilm-l6-v2"), "minilm", work) as encoder,
    ):
        yield url, "qwen", encoder, "minilm"
