"""Measures an engine through its own Python, without HTTP. That Python reads it: it imports nothing of ours.

    python -c SOURCE ENGINE MODEL < work.json

work: {"settings": {...}, "jobs": [{"prompts": [[ids], ...], "outputs": [tokens, ...]}, ...]}. The first job
is the warm-up. Prints a line of JSON for each other job: seconds, output_tokens, and first_seconds, the time
of the same prompts with one token each.
"""

import importlib
import json
import sys
import time
from collections.abc import Callable
from typing import Any


def engine_of(name: str, model: str, settings: "dict[str, Any]") -> "Callable[[Any, Any], int]":
    """A function that runs (prompts, lengths) and returns the tokens written."""
    if name == "sglang":
        loaded = importlib.import_module(name).Engine(model_path=model, **settings)

        def sglang_run(prompts: Any, outputs: Any) -> int:
            params = [{"temperature": 0, "max_new_tokens": n, "ignore_eos": True} for n in outputs]
            found = loaded.generate(input_ids=prompts, sampling_params=params)
            return sum(each["meta_info"]["completion_tokens"] for each in found)

        return sglang_run
    module = importlib.import_module(name)
    llm = module.LLM(model=model, **settings)

    def run(prompts: Any, outputs: Any) -> int:
        params = [
            module.SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False)
            for n in outputs
        ]
        found = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return sum(len(each.outputs[0].token_ids) for each in found)

    return run


def main() -> None:
    """Runs the jobs in order."""
    work = json.load(sys.stdin)
    run = engine_of(sys.argv[1], sys.argv[2], work["settings"])
    warm, *jobs = work["jobs"]
    run(warm["prompts"], warm["outputs"])
    for job in jobs:
        began = time.perf_counter()
        run(job["first"], [1] * len(job["first"]))
        first = time.perf_counter() - began
        began = time.perf_counter()
        tokens = run(job["prompts"], job["outputs"])
        seconds = time.perf_counter() - began
        line = {"seconds": seconds, "first_seconds": first, "output_tokens": tokens}
        print("measured " + json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
