"""Models on a Hugging Face hub: only the files that serving needs, into the hub library's own cache.

The hub's settings apply as everywhere: HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_OFFLINE.
"""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rvllm.config import SourceConfig
from rvllm.errors import ModelError, RvllmError
from rvllm.weights.fetch.cache import FetchError, check_space
from rvllm.weights.fetch.progress import Report, watching
from rvllm.weights.safetensors.directory import INDEX, SINGLE, weight_map

SIDE_SUFFIXES = (".json", ".jinja", ".model", ".tiktoken")
SIDE_NAMES = ("merges.txt", "vocab.txt")
SIDE_FOLDERS = ("", "additional_chat_templates", "1_Pooling")


def fetch_hub(
    repo: str, revision: str | None, file: str | None, source: SourceConfig, report: Report
) -> Path:
    """The snapshot folder of a repository, or the .gguf file in it.

    revision: branch, tag or commit; None is main. file: a .gguf in the repository, or None for the
    safetensors model (or the repository's only .gguf). When the hub cannot be reached, what an earlier pull
    left in the hub's cache is taken, and the report says so; FetchError without such a copy. Also raises
    CapacityError when the disk is too small, ModelError for what is not there or not allowed.
    """
    offline = source.offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    what = repo + (f"@{revision}" if revision else "")
    try:
        if offline:
            return _cached(repo, revision, file, what)
        return _fetched(repo, revision, file, what, report)
    except RvllmError:
        raise
    except Exception as error:  # httpx's, requests' and the hub library's own, by version of the library
        problem = _explained(error, what, revision)
    if isinstance(problem, FetchError):
        with contextlib.suppress(RvllmError):
            path = _cached(repo, revision, file, what)
            report(f"{problem}; taking the copy in the hub's cache", 0, 0)
            return path
    raise problem


def _endpoint() -> str:
    from huggingface_hub.constants import ENDPOINT

    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or ENDPOINT


def _repo_folder(repo: str) -> Path:
    """The repository's folder in the hub's cache: refs/, snapshots/<commit>/ and blobs/."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    return Path(HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")


def _cached(repo: str, revision: str | None, file: str | None, what: str) -> Path:
    folder, wanted = _repo_folder(repo), revision or "main"
    reference = folder / "refs" / wanted
    commit = reference.read_text().strip() if reference.is_file() else wanted
    snapshot = folder / "snapshots" / commit
    if not (snapshot / file if file else snapshot).exists():
        raise FetchError(
            f"{what} is not in the hub's cache and offline mode is on (RVLLM_OFFLINE or HF_HUB_OFFLINE); "
            "pull it with a network first"
        )
    if file is None and not (snapshot / "config.json").is_file():
        file = _only([p.name for p in snapshot.glob("*.gguf")], what)
    return snapshot / file if file else snapshot


def _fetched(repo: str, revision: str | None, file: str | None, what: str, report: Report) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download, try_to_load_from_cache
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    endpoint = _endpoint()
    report(f"asking {endpoint} for {what}", 0, 0)
    info = HfApi(endpoint=endpoint).model_info(repo, revision=revision, files_metadata=True, timeout=30)
    sizes = {s.rfilename: s.size or 0 for s in info.siblings or ()}
    shards = None
    if file is None and INDEX in sizes:
        shards = weight_map(Path(hf_hub_download(repo, INDEX, revision=revision, endpoint=endpoint))).values()
    names, result = choose(sizes, file, set(shards) if shards else None, what)
    absent = [n for n in names if not isinstance(try_to_load_from_cache(repo, n, revision=info.sha), str)]
    total = sum(sizes[n] for n in absent)
    folder = _repo_folder(repo)
    check_space(folder, total, what, setting="HF_HOME")
    with watching(folder / "blobs", report, f"fetching {what}", total):
        snapshot = snapshot_download(
            repo,
            revision=revision,
            endpoint=endpoint,
            allow_patterns=[glob.escape(n) for n in names],
            max_workers=4,
        )
    return Path(snapshot) / result


def choose(
    sizes: Mapping[str, int], file: str | None, shards: set[str] | None, what: str
) -> tuple[list[str], str]:
    """(files to fetch, path of the model within them) out of a repository's files.

    shards: the files that model.safetensors.index.json names, where there is one.
    """
    ggufs = sorted(n for n in sizes if n.endswith(".gguf"))
    if file is None and "config.json" not in sizes and ggufs:
        file = _only(ggufs, what)
    if file is not None:
        if file not in sizes:
            raise ModelError(f"{what} has no file {file}; its GGUF files: {_listed(ggufs)}")
        stem, mark, tail = file.rpartition("-00001-of-")  # of a split one, all parts
        parts = [n for n in ggufs if n.startswith(f"{stem}-") and n.endswith(f"-of-{tail}")]
        return parts if mark else [file], file
    weights = shards or {SINGLE} & sizes.keys()
    weights = weights or {n for n in sizes if n.endswith(".safetensors") and "/" not in n}
    if "config.json" not in sizes or not weights:
        missing = "config.json" if "config.json" not in sizes else "safetensors files"
        hint = f"; name one of its GGUF files: {what}:{_listed(ggufs)}" if ggufs else ""
        raise ModelError(f"{what} has no {missing}{hint}")
    absent = sorted(weights - sizes.keys())
    if absent:
        raise ModelError(f"{what}: shards named in {INDEX} are not in the repository: {_listed(absent)}")
    return sorted(weights | {n for n in sizes if _is_side_file(n)}), ""


def _is_side_file(name: str) -> bool:
    folder, _, base = name.rpartition("/")
    if folder not in SIDE_FOLDERS or base.startswith(("pytorch_model", "tf_model", "flax_model")):
        return False
    return base.endswith(SIDE_SUFFIXES) or base in SIDE_NAMES


def _only(ggufs: list[str], what: str) -> str:
    if not ggufs:
        raise ModelError(f"{what}: neither config.json nor a .gguf file in the hub's cache; pull it again")
    if len(ggufs) > 1:
        raise ModelError(f"{what} has several GGUF files; add one of them: {what}:{_listed(sorted(ggufs))}")
    return ggufs[0]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more or "none"


def _explained(error: Exception, what: str, revision: str | None) -> RvllmError:
    """One line for what the hub library or its HTTP client raised."""
    from huggingface_hub import errors

    endpoint = _endpoint()
    response: Any = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return ModelError(f"{what} is gated: accept its terms at {endpoint} and set HF_TOKEN")
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelError(f"{what}: the hub at {endpoint} has no revision {revision} of it")
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403, 404):
        return ModelError(
            f"{what}: not on the hub at {endpoint}, or private (status {status or 404}); check the name, "
            "or set HF_TOKEN to a token that may read it"
        )
    if isinstance(error, errors.HFValidationError):
        return ModelError(f"{what}: not a valid name on the hub")
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return ModelError(f"{what}: cannot write to the hub's cache: {error.strerror} ({error.filename})")
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    module = type(error).__module__.partition(".")[0]  # httpx or its successor, or requests
    if status is not None:
        return FetchError(f"{what}: the hub at {endpoint} answered with status {status}; try again later")
    if isinstance(error, OSError) or module.startswith(("http", "requests", "urllib3")):
        return FetchError(f"{what}: the hub at {endpoint} cannot be reached: {first}")
    return ModelError(f"{what}: fetching from {endpoint} failed: {type(error).__name__}: {first}")
