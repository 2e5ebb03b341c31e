"""Real models through `rvllm serve` on the GPU: 64 greedy tokens on every golden prompt.

    PYTHONPATH=src python scripts/gpu/real_models.py smollm2-135m=FILE.gguf qwen2.5-coder-0.5b=FILE.gguf

The golden files (tests/golden/greedy_*.json) hold what Transformers draws in float32 from the dequantised
weights; the CPU backend draws the same. Where a 16-bit run first differs, three numbers are printed: how far
apart the two leading float32 logits are there, what 16 bits can tell apart on that prompt (the error of the
leading logits in Transformers' own 16-bit run, tests/golden/sixteen_bits.json), and how far the golden token
is below the best one here. Exits 1 when leading logits that 16 bits can tell apart were mistaken, or when the
last number is larger than any error of Transformers' logits on that prompt.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parents[2] / "tests" / "golden"
PORT = 8137


def ask(path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """A request to the server on the loopback address."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}{path}", data, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        found: dict[str, Any] = json.loads(answer.read() or b"{}")
        return found


def wait_until_ready(server: subprocess.Popen[bytes], began: float) -> float:
    """Seconds from the process's start to a healthy server."""
    while True:
        try:
            ask("/health")
            return time.perf_counter() - began
        except OSError:
            if server.poll() is not None:
                raise SystemExit(f"the server ended with {server.returncode}") from None
            time.sleep(0.02)


def compare(case: dict[str, Any]) -> tuple[int, float | None]:
    """(tokens that agree, how far below the best the golden token is where they first differ)."""
    wanted, prompt = case["output_token_ids"], case["prompt_token_ids"]
    common = {"model": "m", "temperature": 0, "return_token_ids": True}
    answer = ask(
        "/v1/completions", {**common, "prompt": prompt, "max_tokens": len(wanted), "ignore_eos": True}
    )
    got = answer["choices"][0]["token_ids"]
    for i, (a, b) in enumerate(zip(wanted, got, strict=True)):
        if a != b:
            scored = ask(
                "/v1/completions",
                {**common, "prompt": [*prompt, *wanted[: i + 1]], "max_tokens": 1, "prompt_logprobs": 5},
            )
            last = scored["choices"][0]["prompt_logprobs"][-1]
            return i, max(entry["logprob"] for entry in last.values()) - last[str(a)]["logprob"]
    return len(wanted), None


def check(name: str, path: str, dtype: str) -> bool:
    """Starts a server, compares all prompts, stops it."""
    cases = json.loads((GOLDEN / f"greedy_{name}.json").read_text())["cases"]
    measured = json.loads((GOLDEN / "sixteen_bits.json").read_text())[name]
    command = [sys.executable, "-m", "rvllm", "serve", "--model", path, "--device", "cuda", "--dtype", dtype,
               "--port", str(PORT), "--served-model-name", "m", "--generation-config", "none"]  # fmt: skip
    began = time.perf_counter()
    server = subprocess.Popen(command)
    try:
        ready = wait_until_ready(server, began)
        ask("/v1/completions", {"model": "m", "prompt": [1, 2, 3], "max_tokens": 1})
        first = time.perf_counter() - began
        results = [compare(case) for case in cases]
    finally:
        server.terminate()
        code = server.wait(30)
    equal, gaps, good = sum(gap is None for _, gap in results), [], True
    for (i, gap), margins, sixteen in zip(results, measured["margins"], measured[dtype], strict=True):
        if gap is not None:
            gaps.append(f"{margins[i]:.3f} of {sixteen['leading']:.3f} at token {i} (here {gap:.3f})")
            good = good and margins[i] < sixteen["leading"] and gap < sixteen["error"]
    print(f"{name} {dtype}: healthy after {ready:.2f} s, first token {first:.2f} s, exit code {code}; "
          f"{equal} of {len(results)} prompts equal over {len(cases[0]['output_token_ids'])} tokens"
          + (f"; first differences: {', '.join(gaps)}" if gaps else ""))  # fmt: skip
    return good


def main() -> int:
    """Checks every NAME=FILE in both 16-bit types."""
    good = [
        check(name, path, dtype)
        for name, path in (argument.split("=", 1) for argument in sys.argv[1:])
        for dtype in ("bfloat16", "float16")
    ]
    return 0 if all(good) else 1


if __name__ == "__main__":
    raise SystemExit(main())
