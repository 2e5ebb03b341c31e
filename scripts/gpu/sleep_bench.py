"""Sleep and waking on a GPU: seconds, memory given back, and the same tokens every time.

    PYTHONPATH=src python scripts/gpu/sleep_bench.py CONFIG_DIR [--times 50] [--gpu-memory-utilization 0.9]
        [--pause 2]

--pause: seconds asleep; the driver clears given-back pages meanwhile, and who wakes up at once waits for it.
Random weights of the configuration. Exits with 1 when a token differs or memory is lost.
"""

from __future__ import annotations

import argparse
import sys
import time
from statistics import median

from rvllm import LLM, SamplingParams
from rvllm.backends.cuda.device.driver import Device


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument("--pause", type=float, default=0.0)
    args = parser.parse_args()
    llm = LLM(
        model=args.config, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", device="cuda",
        gpu_memory_utilization=args.gpu_memory_utilization, max_model_len=4096, max_num_seqs=64,
        enable_sleep_mode=True,
    )  # fmt: skip
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": [97 * i + 13 * j + 1000 for j in range(40)]} for i in range(8)]

    def tokens() -> list[list[int]]:
        return [list(o.outputs[0].token_ids) for o in llm.generate(prompts, params, use_tqdm=False)]

    expected = tokens()
    llm.engine.sleep(1)  # takes host memory, whose mapping stays on the device: 2 MB a GB
    llm.engine.wake_up()
    tokens()
    free = Device.free_memory()[0]
    asleep, awake, given = list[float](), list[float](), list[int]()
    wrong = 0
    for _ in range(args.times):
        began = time.perf_counter()
        llm.engine.sleep(1)
        asleep.append(time.perf_counter() - began)
        given.append(Device.free_memory()[0] - free)
        time.sleep(args.pause)
        began = time.perf_counter()
        llm.engine.wake_up()
        awake.append(time.perf_counter() - began)
        wrong += tokens() != expected
        lost = free - Device.free_memory()[0]
        print(f"asleep after {asleep[-1]:.3f} s, {given[-1] / 1e9:.2f} GB given back; awake after", end=" ")
        print(f"{awake[-1]:.3f} s; so far {wrong} runs with other tokens, {lost} bytes lost", flush=True)
    print(f"{args.times} times: asleep after {median(asleep):.2f} s, at most {max(asleep):.2f}")
    print(f"awake after {median(awake):.3f} s, at most {max(awake):.3f}; {wrong} runs with other tokens")
    print(f"{lost} bytes lost")
    llm.close()
    sys.exit(bool(wrong or lost))


if __name__ == "__main__":
    main()
