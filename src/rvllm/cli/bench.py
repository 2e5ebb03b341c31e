"""`rvllm bench serve | throughput | latency`: measurements with vLLM's arguments and fields."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import datetime
import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rvllm.bench.arrivals import Traffic, rate_changes
from rvllm.cli.common.load import REFUSED, add_load
from rvllm.cli.common.workload import add_datasets, add_refused, asked_of, of_server, of_tokenizer
from rvllm.config import EngineConfig
from rvllm.errors import RvllmError, UsageError
from rvllm.settings import add_flags, build

if TYPE_CHECKING:
    pass

_ELSEWHERE = {
    "sweep": "a loop over `rvllm bench serve --save-result`",
    "startup": "`rvllm serve`, which prints how long its start took",
    "mm-processor": "nothing: models take and give text alone",
}  # vLLM's other kinds, and what to use instead
_OURS_ALONE = "rvLLM alone is measured; `rvllm race` measures other engines beside it"
_RANKS = (10, 25, 50, 75, 90, 99)


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("bench", help="measure with vLLM's arguments", allow_abbrev=False)
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    serve = kinds.add_parser("serve", help="load on a running server", allow_abbrev=False)
    add_load(serve)
    throughput = kinds.add_parser("throughput", help="many requests, no server", allow_abbrev=False)
    _add_workload(throughput)
    _add_throughput(throughput)
    add_flags(throughput, EngineConfig, "engine")
    for name in _ELSEWHERE:
        other = kinds.add_parser(name, add_help=False)
        other.add_argument("words", nargs=argparse.REMAINDER)
    latency = kinds.add_parser("latency", help="one batch, over and over", allow_abbrev=False)
    _add_workload(latency)
    latency.set_defaults(input_len=32, output_len=128)
    latency.add_argument("--use-beam-search", action="store_true", help="--n is the number of beams")
    latency.add_argument("--batch-size", type=int, default=8, help="requests at once [8]")
    latency.add_argument("--num-iters-warmup", type=int, default=10, help="runs before those that count [10]")
    latency.add_argument("--num-iters", type=int, default=30, help="runs [30]")
    add_flags(latency, EngineConfig, "engine")


def _add_workload(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--input-len", "--random-input-len", type=int, help="tokens of a prompt")
    add("--output-len", "--random-output-len", type=int, help="tokens of an answer")
    add("--n", type=int, default=1, help="answers to each prompt [1]")
    add("--output-json", help="write the result to this file")
    add("--disable-detokenize", action="store_true", help="token ids alone")
    add_refused(parser, {"--profile": "`rvllm benchmark --profile` times every kernel of a step"})


def _add_throughput(parser: argparse.ArgumentParser) -> None:
    """vLLM's further arguments of `throughput`."""
    add = parser.add_argument
    add("--num-prompts", type=int, default=1000, help="requests [1000]")
    add("--prefix-len", type=int, help="tokens alike before each prompt of random, sonnet [0, 200]")
    add_datasets(parser)
    add("--dataset", dest="dataset_path", help=argparse.SUPPRESS)
    parser.set_defaults(dataset_name=None)
    add("--backend", default="vllm", help=argparse.SUPPRESS)
    add("--async-engine", action="store_true", help=argparse.SUPPRESS)  # there is one engine
    add_refused(parser, {"--lora-path": REFUSED["--lora-modules"], "--hf-max-batch-size": _OURS_ALONE})


def main(args: argparse.Namespace) -> int:
    """Runs one kind of measurement; 1 when a request failed."""
    if args.kind in _ELSEWHERE:
        raise UsageError(f"bench {args.kind} is vLLM's; here it is {_ELSEWHERE[args.kind]}")
    if args.kind == "throughput" and args.backend != "vllm":
        raise UsageError(f"--backend {args.backend}: {_OURS_ALONE}")
    return {"serve": _serve, "throughput": _throughput, "latency": _latency}[args.kind](args)


def _serve(args: argparse.Namespace) -> int:
    from rvllm.bench.load import run
    from rvllm.bench.serving import details, page, summary
    from rvllm.cli.common import load

    load.check_load(args)
    metrics, ranks, goals = load.metrics_of(args)
    traffic = load.traffic_of(args)
    target, base, key = load.target_of(args)
    about: dict[str, Any] = dict(load.pairs_of("--metadata", args.metadata))
    model = load.served_model(args, base, key)
    if args.output_len is not None:
        _spread_output(args, args.output_len)
    asked = asked_of(args, args.num_prompts + args.num_warmups, of_server(args, base, key))
    bodies = [load.body_of(args, model, one) for one in asked]
    lengths = [len(one.prompt) if isinstance(one.prompt, list) else 0 for one in asked]
    warm, most = min(args.num_warmups, len(asked) - 1), args.max_concurrency
    if warm:
        asyncio.run(run(target, bodies[:warm], lengths[:warm], most=most))
    arrivals, at = traffic.arrivals(len(bodies) - warm, args.seed), time.time()
    began = time.perf_counter()
    sent = asyncio.run(run(target, bodies[warm:], lengths[warm:], arrivals=arrivals, most=most))
    found = summary(sent, time.perf_counter() - began, metrics, ranks, goals)
    wanted = [("Maximum request concurrency:", most)] if most else []
    wanted += [] if math.isinf(args.request_rate) else [("Request rate configured (RPS):", args.request_rate)]
    print(page(found, metrics, ranks, wanted))
    if failed := next((one.error for one in sent if one.error), ""):
        print(f"the first failure: {failed}")
    if traffic.ramp:
        about |= {"ramp_up_strategy": traffic.ramp, "ramp_up_start_rps": traffic.rate,
                  "ramp_up_end_rps": traffic.end}  # fmt: skip
        found["rps_change_events"] = rate_changes(traffic, arrivals, at)
    if args.save_result or args.append_result:
        _save_serve(args, traffic, model, about, found | (details(sent) if args.save_detailed else {}))
    return int(found["failed"] > 0)


def _save_serve(
    args: argparse.Namespace, traffic: Traffic, model: str, about: dict[str, Any], found: dict[str, Any]
) -> None:
    from rvllm.cli.common.load import result_file

    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    rate = "inf" if math.isinf(args.request_rate) else args.request_rate
    head = {
        "date": now, "backend": args.backend, "endpoint_type": args.backend, "label": args.label,
        "model_id": model, "tokenizer_id": args.tokenizer or model, "num_prompts": args.num_prompts,
    }  # fmt: skip
    traffic_fields = {
        "request_rate": rate, "burstiness": args.burstiness, "max_concurrency": args.max_concurrency,
    }  # fmt: skip
    file = result_file(args, traffic, model, now)
    _write(file, {**head, **about, **traffic_fields, **found}, append=args.append_result)


def _write(path: Path, values: dict[str, Any], append: bool = False) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a" if append else "w", encoding="utf-8") as file:
            file.write(json.dumps(values, indent=None if append else 2) + "\n")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None


def _loaded(args: argparse.Namespace) -> tuple[Any, EngineConfig]:
    """(a loaded LLM, its settings). Raises RvllmError for a model that generates nothing."""
    from rvllm.offline.llm import LLM

    config = build(EngineConfig, vars(args))
    if args.enable_prefix_caching is None:  # runs repeat their prompts, which would then cost nothing
        config = dataclasses.replace(config, enable_prefix_caching=False)
    settings = {name: value for name, value in dataclasses.asdict(config).items() if value is not None}
    llm = LLM(**settings)
    if llm.engine.facts.embedding_size is not None:
        llm.close()
        raise RvllmError(f"{llm.engine.facts.architecture} gives embeddings; text is measured here")
    return llm, config


def _params(args: argparse.Namespace, output_len: int) -> Any:
    from rvllm.engine.sampling_params import SamplingParams

    return SamplingParams(n=args.n, max_tokens=output_len, ignore_eos=True,
                          detokenize=not args.disable_detokenize)  # fmt: skip


def _spread(args: argparse.Namespace) -> None:
    """`throughput` has one argument for a length that each data set has its own of elsewhere."""
    args.random_input_len, args.random_output_len = args.input_len or 1024, args.output_len or 128
    if args.input_len is not None:
        args.sonnet_input_len = args.input_len
    if args.prefix_len is not None:
        args.random_prefix_len = args.sonnet_prefix_len = args.prefix_len
    if args.output_len is not None:
        _spread_output(args, args.output_len)


def _spread_output(args: argparse.Namespace, length: int) -> None:
    args.random_output_len = args.sharegpt_output_len = args.custom_output_len = length
    args.sonnet_output_len = args.prefix_repetition_output_len = length


def _throughput(args: argparse.Namespace) -> int:
    from rvllm.bench.datasets import check_name

    if args.dataset_name is None:  # vLLM's is a file of sharegpt, and random where there is no file
        args.dataset_name = "sharegpt" if args.dataset_path else "random"
    check_name(args.dataset_name)
    _spread(args)
    llm, config = _loaded(args)
    with llm:
        args.vocab_size = min(args.vocab_size, llm.engine.facts.vocab_size)
        args.seed = config.seed
        asked = asked_of(args, args.num_prompts, of_tokenizer(llm.tokenizer))
        prompts = [{"prompt_token_ids" if isinstance(a.prompt, list) else "prompt": a.prompt} for a in asked]
        params = [_params(args, one.output_len) for one in asked]
        began = time.perf_counter()
        outputs = llm.generate(prompts, params)
        seconds = time.perf_counter() - began
    written = sum(len(one.token_ids) for output in outputs for one in output.outputs)
    read = sum(len(output.prompt_token_ids) for output in outputs)
    rates = len(outputs) / seconds, (read + written) / seconds, written / seconds
    print("Throughput: {:.2f} requests/s, {:.2f} total tokens/s, {:.2f} output tokens/s".format(*rates))
    print(f"Total num prompt tokens:  {read}\nTotal num output tokens:  {written}")
    if args.output_json:
        _write(Path(args.output_json), {
            "elapsed_time": seconds, "num_requests": len(outputs), "total_num_tokens": read + written,
            "requests_per_second": len(outputs) / seconds, "tokens_per_second": (read + written) / seconds,
        })  # fmt: skip
    return 0


def _latency(args: argparse.Namespace) -> int:
    from rvllm.bench.prompts import random_tokens
    from rvllm.bench.stats import percentile
    from rvllm.engine.sampling_params import BeamSearchParams

    llm, config = _loaded(args)
    ids = random_tokens(args.batch_size, args.input_len, llm.engine.facts.vocab_size, config.seed)
    prompts, params = [{"prompt_token_ids": each} for each in ids], _params(args, args.output_len)
    beams = BeamSearchParams(args.n, args.output_len, ignore_eos=True) if args.use_beam_search else None
    times = []
    with llm:
        for i in range(args.num_iters_warmup + args.num_iters):
            began = time.perf_counter()
            if beams:
                llm.beam_search(prompts, beams)
            else:
                llm.generate(prompts, params, use_tqdm=False)
            if i >= args.num_iters_warmup:
                times.append(time.perf_counter() - began)
    average = sum(times) / len(times)
    ranks = {str(rank): percentile(times, rank) for rank in _RANKS}
    print(f"Avg latency: {average} seconds")
    for rank, value in ranks.items():
        print(f"{rank}% percentile latency: {value} seconds")
    if args.output_json:
        _write(Path(args.output_json), {"avg_latency": average, "latencies": times, "percentiles": ranks})
    return 0
