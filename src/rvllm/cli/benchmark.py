"""`rvllm benchmark`: times the engine in this process, without HTTP or detokenising in between."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rvllm.cli.common.gate import add_gate, gate_limits
from rvllm.config import EngineConfig
from rvllm.errors import CapacityError, RvllmError, UsageError
from rvllm.settings import add_flags, build

if TYPE_CHECKING:
    from rvllm.bench.profile import Earlier
    from rvllm.bench.report import Result, Run
    from rvllm.engine.core import EngineCore


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("benchmark", help="time the engine", allow_abbrev=False)
    group = parser.add_argument_group("workload")
    group.add_argument(
        "--n", default="1,4,16", metavar="LIST", help="requests at once, one measurement each [1,4,16]"
    )
    group.add_argument(
        "--input-len", metavar="INT", help="prompts of so many random tokens instead of the fixed texts"
    )
    group.add_argument(
        "--output-len", default="128", metavar="INT", help="tokens each request generates [128]"
    )
    group.add_argument("--runs", default="3", metavar="INT", help="runs to take the median of [3]")
    group.add_argument("--json", metavar="FILE", help="write the results to FILE")
    group.add_argument("--compare", metavar="FILE", help="show an earlier --json FILE beside the results")
    add_gate(group, "FILE", "an earlier --json FILE to be no worse than")
    group.add_argument(
        "--profile",
        action="store_true",
        help="on a GPU: time every kernel of one decode step beside its floor, instead of the runs",
    )
    add_flags(parser, EngineConfig, "engine")


def main(args: argparse.Namespace) -> int:
    """Measures every batch size and prints the table."""
    from rvllm.backends.load import choose_device
    from rvllm.bench.gate import judge_all, page
    from rvllm.bench.profile import read_profiles
    from rvllm.bench.report import changes, gated, read_json, table, write_json
    from rvllm.engine.core import EngineCore

    sizes = [_whole("--n", size) for size in args.n.split(",")]
    length = None if args.input_len is None else _whole("--input-len", args.input_len)
    output_len, runs = _whole("--output-len", args.output_len), _whole("--runs", args.runs)
    if args.gate and (args.profile or args.compare):
        raise UsageError("--gate is neither for --profile nor for --compare")
    limits = gate_limits(args) if args.gate else None
    earlier = Path(args.compare or args.gate) if args.compare or args.gate else None
    before = (
        read_json(earlier, "--gate" if args.gate else "--compare") if earlier and not args.profile else []
    )
    profiles = read_profiles(earlier) if earlier and args.profile else []
    config = build(EngineConfig, vars(args))
    if args.profile and choose_device(config) == "cpu":
        raise UsageError("--profile times GPU kernels; the CPU backend has none (--device cuda)")
    if args.json and not os.access(Path(args.json).absolute().parent, os.W_OK):
        raise UsageError(f"--json: cannot write {args.json}: its folder is not there or not ours to write")
    if args.enable_prefix_caching is None:  # runs repeat their prompts, which would then cost nothing
        config = dataclasses.replace(config, enable_prefix_caching=False)

    began = time.perf_counter()
    core = EngineCore.from_config(config)
    try:
        if core.facts.embedding_size is not None:
            raise UsageError(
                f"{core.facts.architecture} gives embeddings; the benchmark times generated text"
            )
        about = _about(core, config, length, output_len, runs, time.perf_counter() - began)
        print(_heading(core, config, about))
        if earlier and (changed := changes(earlier, about)):
            if args.gate:
                raise UsageError(f"--gate: {earlier} was measured otherwise: {'; '.join(changed)}")
            print(f"{earlier} was measured otherwise: {'; '.join(changed)}")
        if args.profile:
            _profile(core, sizes, (length or 32) + output_len // 2, about, profiles, args.json)
            return 0
        results, samples = _measure_all(core, config, sizes, length, output_len, runs)
        device = core.stats().backend
    finally:
        core.close()
    print(table(results, before))
    if "rvllm:decode_idle_share" in device:
        print(f"GPU idle between decode steps: {device['rvllm:decode_idle_share']:.2%} of their time")
    about["backend_stats"] = device
    figures = gated(earlier, results, samples) if earlier and limits else []  # --json may name the same file
    if args.json:
        write_json(Path(args.json), about, results, samples)
    if limits:
        checks, code = judge_all(figures, limits)
        print(page(checks, code))
        return code
    return 0


def _measure_all(
    core: EngineCore,
    config: EngineConfig,
    sizes: Sequence[int],
    length: int | None,
    output_len: int,
    runs: int,
) -> tuple[list[Result], list[dict[str, list[float]]]]:
    """Every batch size, warmed up: its result and the samples behind it."""
    from rvllm.bench.report import samples_of, summarise

    results, samples = [], []
    for n in sizes:
        prompts = _prompts(core, config, n, length)
        _check_room(core, prompts, output_len)
        _measure(core, prompts, min(output_len, 8))
        each = [_measure(core, prompts, output_len) for _ in range(runs)]
        results.append(summarise(n, each))
        samples.append(samples_of(n, each))
        if sys.stderr.isatty():
            print(f"N={n}: {results[-1].tokens_per_s:.1f} tok/s", file=sys.stderr)
    return results, samples


def _profile(
    core: EngineCore,
    sizes: Sequence[int],
    context: int,
    about: dict[str, Any],
    before: Sequence[Earlier],
    target: str | None,
) -> None:
    """Prints, for every batch size, one decode step kernel by kernel; writes them as JSON when asked."""
    from rvllm.bench.profile import profile_table, write_profiles

    backend: Any = core.backend
    profiles = [backend.profile(n, context) for n in sizes]
    for profile in profiles:
        print(profile_table(profile, before))
    if target:
        write_profiles(Path(target), about, profiles)


def _whole(flag: str, text: str) -> int:
    if not text.strip().isdigit() or int(text) < 1:
        raise UsageError(f"{flag}: expected whole numbers of at least 1, got {text!r}")
    return int(text)


def _about(
    core: EngineCore,
    config: EngineConfig,
    length: int | None,
    output_len: int,
    runs: int,
    load_seconds: float,
) -> dict[str, Any]:
    """What was measured, for the JSON file."""
    from rvllm.version import __version__

    return {
        "version": __version__,
        "model": config.model,
        "architecture": core.facts.architecture,
        "backend": core.ready.backend,
        "dtype": core.facts.dtype,
        "load_seconds": load_seconds,
        "input_len": length,
        "output_len": output_len,
        "runs": runs,
        "engine": dataclasses.asdict(config),
    }


def _heading(core: EngineCore, config: EngineConfig, about: dict[str, Any]) -> str:
    length = about["input_len"]
    prompts = "fixed prompts" if length is None else f"{length} random tokens"
    cache = "on" if config.enable_prefix_caching else "off"
    return (
        f"rvLLM {about['version']} · {config.model} · {core.facts.architecture} · {core.ready.backend}, "
        f"{core.facts.dtype} · loaded in {about['load_seconds']:.2f} s\n"
        f"{prompts} in, {about['output_len']} tokens out, median of {about['runs']} after a warm-up; "
        f"prefix cache {cache}"
    )


def _prompts(core: EngineCore, config: EngineConfig, n: int, length: int | None) -> list[list[int]]:
    """Token ids of `n` prompts: the fixed texts, or random ones of a length."""
    from rvllm.bench.prompts import fixed, random_tokens

    if length is None and not config.skip_tokenizer_init and config.load_format != "dummy":
        from rvllm.text.tokenizers.tokenizer import Tokenizer

        tokenizer = Tokenizer.load(Path(core.facts.model_path))
        return [tokenizer.encode(text) for text in fixed(n)]
    return random_tokens(n, length or 32, core.facts.vocab_size, config.seed)


def _check_room(core: EngineCore, prompts: Sequence[Sequence[int]], output_len: int) -> None:
    """Raises CapacityError when the requests could not all run at once, which would measure queueing."""
    limits = core.ready.limits
    longest = max(len(prompt) for prompt in prompts) + output_len
    if longest > limits.max_model_len:
        raise CapacityError(f"{longest} tokens a request exceed the context of {limits.max_model_len} "
                            "(--input-len, --output-len, --max-model-len)")  # fmt: skip
    if len(prompts) > limits.max_num_seqs:
        raise CapacityError(f"--n {len(prompts)} exceeds --max-num-seqs {limits.max_num_seqs}")
    blocks = sum(-(-(len(prompt) + output_len) // limits.block_size) for prompt in prompts)
    if blocks > limits.num_blocks:
        raise CapacityError(f"--n {len(prompts)} needs {blocks} KV blocks, there are {limits.num_blocks} "
                            "(--num-blocks, --kv-cache-memory-gb)")  # fmt: skip


def _measure(core: EngineCore, prompts: Sequence[list[int]], output_len: int) -> Run:
    """One run: all requests at once, each drawing exactly `output_len` tokens greedily."""
    from rvllm.bench.report import Run
    from rvllm.engine.ipc.messages import Generate, Sampling

    sampling = Sampling(max_tokens=output_len)  # no stop tokens: the end of sequence is drawn like any other
    last: dict[str, float] = {}
    run = Run(sum(len(prompt) for prompt in prompts), 0, 0.0, [], [])
    began = time.perf_counter()
    for number, prompt in enumerate(prompts):
        core.add_request(Generate(str(number), prompt, sampling, arrival=time.time()))
    while core.has_work():
        outputs = core.step()
        now = time.perf_counter() - began
        for output in outputs:
            if output.finish_reason == "error":
                raise RvllmError(f"the engine refused a prompt: {output.error}")
            seen = last.get(output.request_id)
            if output.token_ids:
                run.firsts.append(now) if seen is None else run.gaps.append(now - seen)
                last[output.request_id] = now
                run.output_tokens += len(output.token_ids)
    run.seconds = time.perf_counter() - began
    return run
