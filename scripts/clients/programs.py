"""Programs that people run rather than import: Codex CLI, Continue and aider in a small repository, guidellm.

Qwen2.5-Coder-0.5B is too small to be of use to an agent; what is checked is that each of them asks, is
answered and takes the answer.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness import HERE, both, fetched, installed, listening, npm_installed, ran, served

QUESTION = "What is the capital of France? Answer in one word; use no tools."
CODEX_CONFIG = """model = "qwen"
model_provider = "rvllm"
model_context_window = 8192
[model_providers.rvllm]
name = "rvllm"
base_url = "{url}/v1"
wire_api = "responses"
"""
# So that the prompt has 2,000 tokens instead of 8,000: what a CPU computes in a minute.
CODEX_LEAN = ("multi_agent", "goals", "apps", "plugins", "skill_search")
CONTINUE_CONFIG = """name: local
version: 0.0.1
schema: v1
models:
  - name: qwen
    provider: openai
    model: qwen
    apiBase: {url}/v1
    apiKey: none
    roles: [chat]
    defaultCompletionOptions: {{temperature: 0, maxTokens: 40}}
"""


def repository(folder: Path) -> Path:
    """A git repository with one file."""
    made = folder / "repository"
    made.mkdir()
    (made / "calc.py").write_text("def add(a, b):\n    return a - b\n")
    author = ["-c", "user.name=test", "-c", "user.email=test@example.com"]
    for words in (["init", "-q"], ["add", "."], [*author, "commit", "-qm", "calc"]):
        subprocess.run(["git", *words], check=True, cwd=made)
    return made


def said(command: Sequence[str | Path], folder: Path, variables: Mapping[str, str]) -> str | None:
    """What a program printed, which is printed here too; None when it failed."""
    log = folder / "said.txt"
    shell = ["bash", "-c", 'set -o pipefail; "$@" < /dev/null 2>&1 | tee "$0"', str(log), *map(str, command)]
    return log.read_text() if ran(shell, folder, variables=variables) else None


def answered(url: str) -> int:
    """How many requests the server has answered to their end."""
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        found = re.findall(r"^vllm:request_success_total\{.*\} (\S+)$", answer.read().decode(), re.MULTILINE)
    return int(sum(map(float, found)))


def codex(work: Path) -> bool:
    """Codex CLI over `/v1/responses`: its tools, its stream, its answer."""
    program = npm_installed(work, "codex", "@openai/codex") / "node_modules" / ".bin" / "codex"
    with (
        served(fetched("qwen2.5-coder-0.5b"), "qwen", work, "--max-model-len", "8192") as url,
        tempfile.TemporaryDirectory(dir=work) as home,
    ):
        folder = repository(Path(home))
        (Path(home) / "config.toml").write_text(CODEX_CONFIG.format(url=url))
        (Path(home) / "short.md").write_text("You are a helpful coding agent.")
        flags = ["-c", f"model_instructions_file={home}/short.md", "-s", "read-only"]
        flags += [word for name in CODEX_LEAN for word in ("--disable", name)]
        text = said([program, "exec", *flags, QUESTION], folder, {"CODEX_HOME": home, "HOME": home})
        return text is not None and "Paris" in text.rpartition(QUESTION)[2]


def continue_cli(work: Path) -> bool:
    """Continue's command line over chat completions."""
    program = npm_installed(work, "continue", "@continuedev/cli") / "node_modules" / ".bin" / "cn"
    with (
        served(fetched("qwen2.5-coder-0.5b"), "qwen", work, "--max-model-len", "8192") as url,
        tempfile.TemporaryDirectory(dir=work) as home,
    ):
        folder = repository(Path(home))
        config = Path(home) / "config.yaml"
        config.write_text(CONTINUE_CONFIG.format(url=url))
        text = said([program, "--config", config, "--exclude", "*", "-p", QUESTION], folder, {"HOME": home})
        return text is not None and "Paris" in text


def aider(work: Path) -> bool:
    """aider over chat completions, streamed, with a file in the chat."""
    program = installed(work, "aider", "aider-chat") / "aider"
    with (
        served(fetched("qwen2.5-coder-0.5b"), "qwen", work, "--max-model-len", "8192") as url,
        tempfile.TemporaryDirectory(dir=work) as home,
    ):
        folder = repository(Path(home))
        variables = {"OPENAI_API_BASE": f"{url}/v1", "OPENAI_API_KEY": "none", "HOME": home}
        quiet = "--no-show-model-warnings --analytics-disable --no-check-update --no-show-release-notes"
        flags = f"--model openai/qwen --edit-format whole --map-tokens 0 --yes-always {quiet} --no-gitignore"
        asked = ["--message", "add must return the sum of a and b. Fix it.", "calc.py"]
        variables["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # nothing is fetched from elsewhere
        text = said([program, *flags.split(), *asked], folder, variables)
        return text is not None and answered(url) > 0


def open_webui(work: Path) -> bool:
    """Open WebUI's server between its page's requests and ours, with vectors from MiniLM; gigabytes."""
    folder = installed(work, "open-webui", "open-webui", "torch==2.13.0")
    with both(work) as (url, model, encoder_url, encoder), tempfile.TemporaryDirectory(dir=work) as home:
        variables = {
            "DATA_DIR": home, "HOME": home, "WEBUI_SECRET_KEY": "none",
            "OFFLINE_MODE": "True", "HF_HUB_OFFLINE": "1",
            "ENABLE_OLLAMA_API": "False", "OPENAI_API_BASE_URLS": f"{url}/v1;{encoder_url}/v1",
            "OPENAI_API_KEYS": "none;none", "RAG_EMBEDDING_ENGINE": "openai", "RAG_EMBEDDING_MODEL": encoder,
            "RAG_OPENAI_API_BASE_URL": f"{encoder_url}/v1", "RAG_OPENAI_API_KEY": "none",
            "ANONYMIZED_TELEMETRY": "False", "DO_NOT_TRACK": "1",
        }  # fmt: skip
        with listening([folder / "open-webui", "serve", "--host", "127.0.0.1"], home, variables) as page:
            return ran([folder / "python", HERE / "open_webui_loop.py", page, model, encoder], work)


def guidellm(work: Path) -> bool:
    """guidellm: prompts of a file one after the other; its report says how fast."""
    program = installed(work, "guidellm", "guidellm", "torch==2.13.0") / "guidellm"
    prompts = work / "guidellm-prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Count from {i}."}) + "\n" for i in range(8)))
    report = work / "guidellm.json"
    with served(fetched("smollm2-135m"), "small", work, "--max-model-len", "1024") as url:
        flags = [
            "--backend", f"kind=openai_http,target={url},model=small", "--profile", "kind=synchronous",
            "--constraint", "kind=max_requests,count=4",
            "--data", f"kind=json_file,path={prompts}",
            "--output", f"kind=json,path={report}", "--disable-console-interactive",
        ]  # fmt: skip
        if not ran([program, "run", *flags], work) or answered(url) < 4:
            return False
    (run,) = json.loads(report.read_text())["benchmarks"]
    return bool(run["metrics"]["request_totals"]["successful"] == 4)
