"""Runs vLLM's own examples with only the import changed, and prints what becomes of each as a table.

    pip download --no-deps --no-binary vllm vllm==0.13.0   # its source package holds the examples
    python scripts/vllm_examples.py vllm-0.13.0.tar.gz [WORD ...]

Offline scripts run in a process of their own; the names of models in them become paths of small ones: random
numbers with a vocabulary of bytes, all-MiniLM-L6-v2 for vectors, SmolLM2-135M and Qwen2.5-Coder-0.5B for
forms and tools. Online clients run against a server. WORDs choose examples by their names. Needs what the
examples import (openai, torch, ...).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fetch_test_models import fetch
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from rvllm.config import SourceConfig
from rvllm.models.config import ModelConfig
from rvllm.models.registry import build_program
from rvllm.program.dtypes import DType
from rvllm.settings import build
from rvllm.weights.fetch.source import resolve

SECONDS = 300  # that an example may take
IMPORT = re.compile(r"^(\s*)(from|import) vllm\b", re.M)
MODEL = re.compile(r"""(["'])[\w.-]+/[\w.-]+\1""")
OFFLINE = {  # by path below examples/: the kind of model it needs, and its arguments
    "offline_inference/basic/basic.py": ("text", ""),
    "offline_inference/basic/chat.py": ("text", ""),
    "offline_inference/basic/classify.py": ("classes", ""),
    "offline_inference/basic/embed.py": ("vectors", ""),
    "offline_inference/basic/generate.py": ("text", ""),
    "offline_inference/basic/reward.py": ("classes", ""),
    "offline_inference/basic/score.py": ("reranker", ""),
    "offline_inference/async_llm_streaming.py": ("text", ""),
    "offline_inference/automatic_prefix_caching.py": ("text", ""),
    "offline_inference/chat_with_tools.py": ("text", ""),
    "offline_inference/context_extension.py": ("qwen3", ""),
    "offline_inference/llm_engine_example.py": ("text", "--model MODEL"),
    "offline_inference/llm_engine_reset_kv.py": ("text", "--model MODEL"),
    "offline_inference/metrics.py": ("text", ""),
    "offline_inference/prefix_caching.py": ("text", ""),
    "offline_inference/reproducibility.py": ("text", ""),
    "offline_inference/simple_profiling.py": ("text", ""),
    "offline_inference/structured_outputs.py": ("smol", ""),
    "pooling/score/offline_reranker.py": ("reranker-tokens", ""),
    "pooling/embed/embed_matryoshka_fy.py": ("vectors", ""),
    "offline_inference/logits_processor/custom.py": ("text", ""),
    "offline_inference/prompt_embed_inference.py": ("text", ""),
    "offline_inference/spec_decode.py": ("text", "--num-prompts 2"),
}
ONLINE = {  # the kind of model the server has, and the client's arguments
    "online_serving/api_client.py": ("text", "--port PORT"),
    "online_serving/openai_chat_completion_client.py": ("text", ""),
    "online_serving/openai_chat_completion_client_with_tools.py": ("tools", ""),
    "online_serving/openai_chat_completion_client_with_tools_required.py": ("tools", ""),
    "online_serving/openai_chat_completion_client_with_tools_xlam.py": ("tools", ""),
    "online_serving/openai_chat_completion_client_with_tools_xlam_streaming.py": ("tools", ""),
    "online_serving/openai_chat_completion_tool_calls_with_reasoning.py": ("tools", ""),
    "online_serving/openai_chat_completion_with_reasoning.py": ("text", ""),
    "online_serving/openai_chat_completion_with_reasoning_streaming.py": ("text", ""),
    "online_serving/openai_completion_client.py": ("text", ""),
    "online_serving/openai_responses_client.py": ("text", ""),
    "online_serving/openai_responses_client_with_mcp_tools.py": ("tools", ""),
    "online_serving/openai_responses_client_with_tools.py": ("tools", ""),
    "online_serving/structured_outputs/structured_outputs.py": ("text", "--constraint choice regex json"),
    "online_serving/token_generation_client.py": ("text", ""),
    "pooling/embed/openai_embedding_client.py": ("vectors", ""),
    "pooling/classify/openai_classification_client.py": ("classes", "--port PORT"),
    "pooling/pooling/openai_pooling_client.py": ("vectors", "--port PORT"),
    "pooling/score/openai_cross_encoder_score.py": ("reranker", "--port PORT"),
    "pooling/score/cohere_rerank_client.py": ("reranker", ""),
}


@dataclass(frozen=True)
class Models:
    """Small models by kind."""

    paths: dict[str, str]

    @staticmethod
    def make(folder: Path) -> Models:
        """Finds the cached ones and writes the random ones."""
        dims: dict[str, Any] = {
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 320, "max_position_embeddings": 32768,
            "torch_dtype": "float32", "eos_token_id": 258, "model_type": "qwen3",
            "architectures": ["Qwen3ForCausalLM"],
        }  # fmt: skip
        random = {
            "text": {},
            "qwen3": {"max_position_embeddings": 4096},
            "classes": {"architectures": ["Qwen2ForSequenceClassification"], "model_type": "qwen2",
                        "num_labels": 2},
            "reranker": {"architectures": ["XLMRobertaForSequenceClassification"],
                         "model_type": "xlm-roberta", "num_labels": 1, "type_vocab_size": 1,
                         "pad_token_id": 0, "max_position_embeddings": 514},
            "reranker-tokens": {"tie_word_embeddings": True},
        }  # fmt: skip
        smol = str(resolve("smollm2-135m", build(SourceConfig, {})))
        paths = {
            "smol": smol,
            "tools": str(fetch("qwen2.5-coder-0.5b")),
            "vectors": str(fetch("minilm-l6-v2")),
        }
        for name, config in random.items():
            paths[name] = str(_random_model(folder / name, {**dims, **config}))
        return Models(paths)


def _random_model(path: Path, config: dict[str, Any]) -> Path:
    """A checkpoint of small random numbers whose tokens are bytes."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens(["no", "yes"])
    tokenizer.save(str(path / "tokenizer.json"))
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    named = {"eos_token": "<|im_end|>", "chat_template": template}
    (path / "tokenizer_config.json").write_text(json.dumps(named))
    source = np.random.default_rng(1)
    program = build_program(ModelConfig(config, "config.json"), DType.F32)
    parts = {part.source: part for weight in program.weights for part in weight.parts}
    save_file(
        {n: source.normal(0, 0.1, p.shape).astype(np.float32) for n, p in parts.items()},
        path / "model.safetensors",
    )
    return path


def run_offline(examples: Path, name: str, small: Models, folder: Path) -> str:
    """ok, or the last line of what went wrong."""
    kind, arguments = OFFLINE[name]
    text = (examples / name).read_text()
    text = MODEL.sub(lambda found: repr(small.paths[kind]), IMPORT.sub(r"\1\2 rvllm", text))
    script = folder / Path(name).name
    script.write_text(text)
    return _run([str(script), *arguments.replace("MODEL", small.paths[kind]).split()], folder)


def _run(words: list[str], folder: Path) -> str:
    source = str(Path(__file__).resolve().parent.parent / "src")
    environment = {**os.environ, "RVLLM_DEVICE": "cpu", "OPENAI_API_KEY": "none",
                   "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])}  # fmt: skip
    try:
        done = subprocess.run(
            [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True,
            timeout=SECONDS, stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"not done after {SECONDS} s"
    if done.returncode == 0:
        return "ok"
    lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    return lines[-1] if lines else f"exit {done.returncode}"


def run_online(examples: Path, names: list[str], small: Models, folder: Path) -> dict[str, str]:
    """The clients' results, with a server for each kind of model."""
    results: dict[str, str] = {}
    for kind in dict.fromkeys(ONLINE[name][0] for name in names):
        port = _free_port()
        flags = ["--model", small.paths[kind], "--port", str(port), "--served-model-name", "served"]
        words = [sys.executable, "-m", "rvllm", "serve", *flags, "--device", "cpu"]
        if kind in ("text", "tools"):
            words += ["--max-model-len", "4096"]
        source = str(Path(__file__).resolve().parent.parent / "src")
        log = (folder / f"{kind}.log").open("w")
        server = subprocess.Popen(
            words, env={**os.environ, "PYTHONPATH": source}, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            _wait(port)
            for name in (n for n in names if ONLINE[n][0] == kind):
                text = (examples / name).read_text().replace("localhost:8000", f"127.0.0.1:{port}")
                text = text.replace("0.0.0.0:8000", f"127.0.0.1:{port}")
                text = re.sub(r"127\.0\.0\.1:8000", f"127.0.0.1:{port}", text)
                text = re.sub(r"(default=|port=)8000", rf"\g<1>{port}", text)
                script = folder / Path(name).name
                script.write_text(MODEL.sub(repr("served"), IMPORT.sub(r"\1\2 rvllm", text)))
                shutil.copy(examples / "online_serving" / "utils.py", folder / "utils.py")
                results[name] = _run(
                    [str(script), *ONLINE[name][1].replace("PORT", str(port)).split()], folder
                )
                print(f"| `{name}` | {results[name][:160]} |", flush=True)
        finally:
            server.terminate()
            server.wait(30)
    return results


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait(port: int) -> None:
    for _ in range(480):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                return
        except OSError:
            time.sleep(0.5)
    raise SystemExit("the server did not become ready")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("package", type=Path, help="vLLM's source package (.tar.gz)")
    parser.add_argument("words", nargs="*", help="parts of the names of examples; default: all")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with tarfile.open(args.package) as package:
            package.extractall(folder, [m for m in package if "/examples/" in m.name], filter="data")
        (examples,) = folder.glob("*/examples")
        small = Models.make(folder / "models")

        def chosen(names: Any) -> list[str]:
            return [n for n in names if not args.words or any(word in n for word in args.words)]

        results: dict[str, str] = {}
        for name in chosen(OFFLINE):
            results[name] = run_offline(examples, name, small, folder)
            print(f"| `{name}` | {results[name][:160]} |", flush=True)
        results |= run_online(examples, chosen(ONLINE), small, folder)
    for title, names in (("offline", OFFLINE), ("online", ONLINE)):
        seen = [results[n] for n in names if n in results]
        if seen:
            print(f"{title}: {seen.count('ok')} of {len(seen)} run")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
