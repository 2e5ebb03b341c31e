"""Compares what lm-eval got from a server with the engine's own numbers.

    python check_lm_eval.py MODEL SAMPLES...

SAMPLES: files that `lm_eval --log_samples` wrote. Every loglikelihood in them is computed again with
`rvllm.LLM` in this process, from prompt_logprobs of the same tokens, with whether each token was the
likeliest. Ends with an error when one differs by more than 0.001 nats.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from rvllm import LLM, SamplingParams

Request = tuple[str, str]  # context, continuation


def requests_of(samples: Path) -> Iterator[tuple[Request, float, bool]]:
    """(request, loglikelihood, whether it is the greedy continuation) of each logged request."""
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        for arguments, answers in zip(sample["arguments"].values(), sample["resps"], strict=True):
            if "arg_1" in arguments and isinstance(answers[0], list):
                value, greedy = answers[0]
                yield (arguments["arg_0"], arguments["arg_1"]), float(value), str(greedy) == "True"


def main(model: str, files: list[str]) -> None:
    """Compares all requests and prints the largest difference."""
    logged = [entry for file in files for entry in requests_of(Path(file))]
    with LLM(model, device="cpu", max_model_len=512, kv_cache_memory_gb=0.2) as llm:
        tokenizer = llm.get_tokenizer()
        prompts, starts = [], []
        for (context, continuation), _, _ in logged:
            prompts.append({"prompt_token_ids": tokenizer.encode(context + continuation, False)})
            starts.append(len(tokenizer.encode(context, False)))
        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1)
        outputs = llm.generate(prompts, params, use_tqdm=False)
    worst = 0.0
    for output, start, (request, value, greedy) in zip(outputs, starts, logged, strict=True):
        ids, positions = output.prompt_token_ids, output.prompt_logprobs
        assert ids is not None and positions is not None
        found = [(positions[i] or {})[ids[i]] for i in range(start, len(ids))]
        total = sum(one.logprob for one in found)
        worst = max(worst, abs(total - value))
        assert abs(total - value) < 1e-3, (request, total, value)
        assert all(one.rank == 1 for one in found) == greedy, request
    assert logged, "no loglikelihoods in these files"
    print(f"{len(logged)} loglikelihoods are the engine's own; they differ by at most {worst:.2g} nats")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
