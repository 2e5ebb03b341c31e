"""Runs other people's clients against `rvllm serve`, on the CPU, with real models.

    python scripts/clients/run.py [CLIENT ...]

Without names, all of them. Each is installed into a folder of its own below --work, never beside rvllm.
Ends with 0 when all went well, 1 when one did not, 69 when one could not be had.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import programs
from harness import HERE, UnavailableError, both, fetched, installed, npm_installed, ran, served

NODE_SCRIPT = HERE.parent.parent / "tests" / "clients" / "openai_client.mjs"
MISSING = 69  # EX_UNAVAILABLE
CHECKED_PATHS = "^/(v1/embeddings|v1/score|score|v1/rerank|v2/rerank|rerank)$"  # that only an encoder answers
SMALL = ("--max-model-len", "64", "--max-num-seqs", "8", "--kv-cache-memory-gb", "0.1")


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
    "codex": programs.codex,
    "continue": programs.continue_cli,
    "aider": programs.aider,
    "guidellm": programs.guidellm,
    "open-webui": programs.open_webui,
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
