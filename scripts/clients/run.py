"""Runs other people's clients against `rvllm serve`, on the CPU, with real models.

    python scripts/clients/run.py [CLIENT ...]

Without names, all of them. Each is installed into a folder of its own below --work, never beside rvllm.
Ends with 0 when all went well, 1 when one did not, 69 when one could not be had.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
NODE_SCRIPT = HERE.parent.parent / "tests" / "clients" / "openai_client.mjs"
MISSING = 69  # EX_UNAVAILABLE
CHECKED_PATHS = "^/(v1/embeddings|v1/score|score|v1/rerank|v2/rerank|rerank)$"  # that only an encoder answers
SMALL = ("--max-model-len", "64", "--max-num-seqs", "8", "--kv-cache-memory-gb", "0.1")


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


def ran(command: Sequence[str | Path], folder: Path, seconds: float = 900) -> bool:
    """Runs a client, its output going where ours goes. False when it fails or hangs.

    What it caches goes to a folder that is gone after it, never beside the scripts.
    """
    print("$", " ".join(str(part).replace(str(folder.parent), "...") for part in command), flush=True)
    with tempfile.TemporaryDirectory() as cache:
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": cache}
        environment = {**os.environ, **offline}
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
    """Qwen2.5-Coder-0.5B and an encoder: (URL, model, URL, encoder)."""
    with (
        served(fetched("qwen2.5-coder-0.5b"), "qwen", work, "--max-model-len", "4096") as url,
        served(fetched("minilm-l6-v2"), "minilm", work) as encoder,
    ):
        yield url, "qwen", encoder, "minilm"


def npm(work: Path) -> bool:
    """The official `openai` npm client: every surface, against Qwen2.5-Coder and MiniLM."""
    folder = npm_installed(work, "npm", "openai@6")
    shutil.copy(NODE_SCRIPT, folder)
    with both(work) as (url, model, encoder_url, encoder):
        given = [f"{url}/v1", model, f"{encoder_url}/v1", encoder]
        return ran(["node", NODE_SCRIPT.name, *given], folder)


def loop(work: Path, name: str, packages: Sequence[str], script: str, encoder: bool) -> bool:
    """A loop in Python: URL and model, and those of an encoder if it wants them."""
    programs = installed(work, name, *packages)
    with both(work) as given:
        return ran([programs / "python", HERE / script, *(given if encoder else given[:2])], work)


def looped(name: str, packages: Sequence[str], encoder: bool = False) -> Callable[[Path], bool]:
    """The client `name`, whose loop lies beside this file."""
    script = f"{name.replace('-', '_')}_loop.py"
    return lambda work: loop(work, name, packages, script, encoder)


def agents(work: Path) -> bool:
    """The OpenAI Agents SDK, Pydantic AI, LangChain: tool loops and streams, against Qwen2.5-Coder."""
    packages = ("openai-agents>=0.24", "pydantic-ai-slim[openai]>=2.6", "langchain-openai>=1", "langgraph>=1")
    programs = installed(work, "agents", *packages)
    with served(fetched("qwen2.5-coder-0.5b"), "qwen", work, "--max-model-len", "2048") as url:
        loops = ("openai_agents_loop.py", "pydantic_ai_loop.py", "langchain_loop.py")
        return all(ran([programs / "python", HERE / loop, f"{url}/v1", "qwen"], work) for loop in loops)


def schemathesis(work: Path) -> bool:
    """Requests made from the OpenAPI document, right ones and wrong ones, in sequences and alone."""
    programs = installed(work, "schemathesis", "schemathesis>=4.32")
    os.environ["SCHEMATHESIS_HOOKS"] = str(HERE / "schemathesis_hooks.py")
    command: list[str | Path] = [
        programs / "schemathesis",
        "--config-file",
        HERE / "schemathesis.toml",
        "run",
    ]
    os.environ["SERVED_MODEL"] = "small"
    with served(fetched("smollm2-135m"), "small", work, *SMALL, "--api-key", "secret") as url:
        asked = ["--header", "Authorization: Bearer secret", "--max-time", "120"]
        generating = ran([*command, f"{url}/openapi.json", *asked], work)
    os.environ["SERVED_MODEL"] = "minilm"
    with served(fetched("minilm-l6-v2"), "minilm", work) as url:
        asked = ["--include-path-regex", CHECKED_PATHS, "--max-time", "45"]
        return ran([*command, f"{url}/openapi.json", *asked], work) and generating


def lm_eval(work: Path) -> bool:
    """lm-eval-harness over completions and chat, and its loglikelihoods beside the engine's own."""
    programs = installed(work, "lm-eval", "lm_eval[api]>=0.4.13")
    tasks, samples, model = HERE / "lm_eval", work / "samples", fetched("qwen2.5-coder-0.5b")
    shutil.rmtree(samples, ignore_errors=True)
    with served(model, "qwen", work, "--max-model-len", "1024") as url:
        plain = f"model=qwen,base_url={url}/v1/completions,num_concurrent=4,max_length=512"
        chat = f"model=qwen,base_url={url}/v1/chat/completions,num_concurrent=4"
        command: list[str | Path] = [programs / "lm_eval", "run", "--include_path", tasks]
        log = ["--output_path", samples, "--log_samples"]
        of_plain = ["--tasks", "rvllm_capitals,rvllm_sums,rvllm_texts", "--model_args", plain, *log]
        of_chat = ["--tasks", "rvllm_sums_chat", "--model_args", chat, "--apply_chat_template"]
        fine = ran([*command, "--model", "local-completions", *of_plain], tasks)
        fine &= ran([*command, "--model", "local-chat-completions", *of_chat], tasks)
    found = sorted(samples.rglob("samples_rvllm_capitals*.jsonl"))
    return fine and ran([sys.executable, HERE / "check_lm_eval.py", model, *found], work)


LLAMA_INDEX = ("llama-index-core", "llama-index-llms-openai-like", "llama-index-embeddings-openai-like")
CLIENTS: dict[str, Callable[[Path], bool]] = {
    "official": looped("official", ("openai", "anthropic"), True),
    "npm": npm,
    "agents": agents,
    "litellm": looped("litellm", ("litellm",), True),
    "llama-index": looped("llama-index", LLAMA_INDEX, True),
    "instructor": looped("instructor", ("instructor",)),
    "outlines": looped("outlines", ("outlines[openai]",)),
    "dspy": looped("dspy", ("dspy", "numpy"), True),
    "schemathesis": schemathesis,
    "lm-eval": lm_eval,
}


def main() -> int:
    """Runs the clients that were asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("clients", nargs="*", metavar="CLIENT", help=", ".join(CLIENTS))
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "rvllm-clients"
    parser.add_argument("--work", type=Path, default=cache, help=f"installations and logs [{cache}]")
    given = parser.parse_args()
    unknown = set(given.clients) - set(CLIENTS)
    if unknown:
        parser.error(f"{min(unknown)} is none of {', '.join(CLIENTS)}")
    results = {}
    work = given.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    for name in given.clients or CLIENTS:
        began = time.monotonic()
        try:
            code = 0 if CLIENTS[name](work) else 1
        except UnavailableError as error:
            code = MISSING
            print(error)
        results[name] = code
        word = {0: "fine", 1: "FAILED", MISSING: "not to be had"}[code]
        print(f"== {name}: {word}, {time.monotonic() - began:.0f} s", flush=True)
    return 1 if 1 in results.values() else max(results.values())


if __name__ == "__main__":
    sys.exit(main())
