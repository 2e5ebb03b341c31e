"""`rvllm bench serve`: vLLM's arguments for load on a running server, and what is made of them."""

from __future__ import annotations

import argparse
import json
import math
import os
import time
import uuid
from pathlib import Path
from typing import Any

from rvllm.bench.arrivals import Traffic
from rvllm.bench.datasets import Asked
from rvllm.bench.load import Target
from rvllm.bench.serving import GOALS, TITLES
from rvllm.cli.common.remote import ask_json
from rvllm.cli.common.workload import add_datasets, add_refused
from rvllm.errors import RvllmError, UsageError

SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty",
)  # fmt: skip
BACKENDS = ("openai", "vllm", "openai-chat")
REFUSED = {
    "--profile": "`rvllm serve --trace-steps FILE` writes down every step of a server, `rvllm trace` "
    "reads it",
    "--use-beam-search": "`rvllm bench latency --use-beam-search` measures beams",
    "--lora-modules": "adapters are not supported; merge them into the model first",
    "--plot-timeline": "--save-detailed writes down each request's times; the server's page draws its steps",
    "--plot-dataset-stats": "--save-detailed writes down each request's lengths",
    "--self-timed --no-self-timed": "times of a trace are not read; --request-rate and --burstiness "
    "say when requests are sent",
    "--probe-request-rate": "a second `rvllm bench serve --input-len 1 --output-len 1 --request-rate R`",
}  # vLLM's arguments that ask for what is not done here, and what to use instead


def add_load(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--backend", default="openai", help="openai (or vllm), openai-chat: which endpoint [openai]")
    add("--base-url", help="the server's address, instead of --host and --port")
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=8000)
    add("--endpoint", help="default: /v1/completions, of openai-chat /v1/chat/completions")
    add("--model", help="default: the first that the server lists")
    add("--served-model-name", help="what the model is called in requests; default: --model")
    add("--tokenizer", help="counts the tokens of texts; default: the server does")
    add("--header", nargs="*", metavar="KEY=VALUE", help="headers of each request")
    add("--request-id-prefix", help="X-Request-Id of each request begins so; default: a random word")
    add("--insecure", action="store_true", help="take any certificate of a server with https")
    add("--ready-check-timeout-sec", type=float, default=0, help="wait so long until the server is there [0]")
    add_datasets(parser)
    add("--random-input-len", "--input-len", type=int, default=1024, help="tokens of a prompt [1024]")
    add("--random-output-len", type=int, default=128, help="tokens of an answer [128]")
    add("--output-len", type=int, help="tokens of an answer, whatever the data set")
    add("--num-prompts", type=int, default=1000, help="requests [1000]")
    add("--num-warmups", type=int, default=0, help="requests before those that count [0]")
    _add_traffic(parser)
    for name in SAMPLING:
        kind = int if name == "top_k" else float
        add("--" + name.replace("_", "-"), type=kind, help="default: the server's")
    add("--logprobs", type=int, help="log-probabilities for each token; default: none")
    add("--extra-body", type=_object, metavar="JSON", help="further fields of each request")
    add(
        "--ignore-eos", action="store_true", help="answers have their whole length, as those to random always"
    )
    add("--seed", type=int, default=0)
    add("--api-key", help="default: the variables OPENAI_API_KEY, RVLLM_API_KEY")
    _add_result(parser)
    add_refused(parser, REFUSED)
    for name in ("tokenizer-mode", "timeline-itl-thresholds", "lora-assignment"):
        add(f"--{name}", help=argparse.SUPPRESS)  # they change nothing by themselves
    add("--skip-tokenizer-init", action="store_true", help=argparse.SUPPRESS)


def _add_traffic(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--request-rate", type=float, default=math.inf, help="requests a second [inf: all at once]")
    add("--burstiness", type=float, default=1.0, help="1: a Poisson process; more: steadier [1]")
    add("--ramp-up-strategy", choices=("linear", "exponential"), help="the rate grows from the first request "
        "to the last")  # fmt: skip
    add("--ramp-up-start-rps", type=float, help="the rate that it grows from")
    add("--ramp-up-end-rps", type=float, help="the rate that it grows to")
    add("--max-concurrency", type=int, help="requests under way at once")


def _add_result(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--percentile-metrics", default="ttft,tpot,itl", help=f"of {', '.join(TITLES)} [ttft,tpot,itl]")
    add("--metric-percentiles", default="99", help="[99]")
    add("--goodput", nargs="+", metavar="NAME:MS", help=f"the most ms of {', '.join(GOALS)} of a request "
        "that counts as good")  # fmt: skip
    add("--label", help="a word for the result")
    add("--metadata", nargs="*", metavar="KEY=VALUE", help="more of the same")
    add("--save-result", action="store_true", help="write a JSON file")
    add("--append-result", action="store_true", help="write it behind what the file holds")
    add("--save-detailed", action="store_true", help="with each request's text, lengths and times in it")
    add("--result-dir", default=".", help="its folder")
    add("--result-filename", help="its name; default: made of label, rate, model and time")
    add("--disable-tqdm", action="store_true", help="there is no bar anyway")


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text[:60]!r}")
    return value


def metrics_of(args: argparse.Namespace) -> tuple[list[str], list[float], dict[str, float]]:
    """(names of TITLES, percentiles, goals by name). Raises UsageError."""
    metrics = [name for name in args.percentile_metrics.split(",") if name]
    if unknown := [name for name in metrics if name not in TITLES]:
        raise UsageError(f"--percentile-metrics: {unknown[0]!r} is not one of {', '.join(TITLES)}")
    try:
        ranks = [float(rank) for rank in args.metric_percentiles.split(",")]
    except ValueError:
        ranks = [-1.0]
    if not all(0 <= rank <= 100 for rank in ranks):
        raise UsageError(f"--metric-percentiles {args.metric_percentiles}: expected numbers from 0 to 100")
    goals = {}
    for pair in args.goodput or ():
        name, _, value = pair.partition(":")
        try:
            goals[name] = float(value)
        except ValueError:
            goals[name] = -1.0
        if name not in GOALS or not goals[name] >= 0:
            raise UsageError(f"--goodput {pair}: expected NAME:MS with a name of {', '.join(GOALS)}")
    return metrics, ranks, goals


def traffic_of(args: argparse.Namespace) -> Traffic:
    """When requests are sent. Raises UsageError."""
    if args.num_prompts < 1 or not args.request_rate > 0 or not args.burstiness > 0:
        raise UsageError("--num-prompts, --request-rate and --burstiness must be above 0")
    if args.max_concurrency is not None and args.max_concurrency < 1:
        raise UsageError("--max-concurrency must be above 0")
    start, end = args.ramp_up_start_rps, args.ramp_up_end_rps
    if args.ramp_up_strategy is None:
        if start is not None or end is not None:
            raise UsageError("--ramp-up-start-rps and --ramp-up-end-rps need --ramp-up-strategy")
        return Traffic(args.request_rate, args.burstiness)
    if args.request_rate != math.inf:
        raise UsageError("--request-rate and --ramp-up-strategy exclude each other")
    if start is None or end is None or not 0 < start <= end < math.inf:
        raise UsageError("--ramp-up-strategy needs 0 < --ramp-up-start-rps <= --ramp-up-end-rps")
    return Traffic(start, args.burstiness, args.ramp_up_strategy, end)


def check_load(args: argparse.Namespace) -> None:
    """Raises UsageError for an endpoint that is not measured here."""
    if args.backend not in BACKENDS:
        raise UsageError(
            f"--backend {args.backend}: completions are measured here ({', '.join(BACKENDS)}); "
            "scripts/bench_embeddings.py measures vectors"
        )


def pairs_of(flag: str, given: list[str] | None) -> dict[str, str]:
    """KEY=VALUE pairs. Raises UsageError."""
    found = {}
    for pair in given or ():
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"{flag} {pair}: expected KEY=VALUE")
        found[key.strip()] = value.strip()
    return found


def target_of(args: argparse.Namespace) -> tuple[Target, str, str | None]:
    """(where requests go, the server's address, its key). Raises UsageError."""
    base = (args.base_url or f"http://{args.host}:{args.port}").rstrip("/")
    key = args.api_key or os.environ.get("OPENAI_API_KEY") or os.environ.get("RVLLM_API_KEY")
    headers = pairs_of("--header", args.header)
    for name, value in headers.items():
        if not name.replace("-", "").replace("_", "").isalnum() or not value.isprintable():
            raise UsageError(f"--header {name}: not the name and value of a header")
        if name.lower() == "authorization":
            key = value.removeprefix("Bearer ")
    if key and "authorization" not in {name.lower() for name in headers}:
        headers["authorization"] = f"Bearer {key}"
    chat = args.backend == "openai-chat"
    endpoint = args.endpoint or ("/v1/chat/completions" if chat else "/v1/completions")
    name = args.request_id_prefix
    name = f"bench-{uuid.uuid4().hex[:8]}-" if name is None else name
    return Target(base + endpoint, tuple(headers.items()), name, args.insecure), base, key


def served_model(args: argparse.Namespace, base: str, key: str | None) -> str:
    """The model's name, as soon as the server answers. Raises RvllmError."""
    until = time.monotonic() + args.ready_check_timeout_sec
    while True:
        try:
            if args.model and args.ready_check_timeout_sec <= 0:
                return str(args.model)
            return str(args.model or ask_json(base, "/v1/models", key)["data"][0]["id"])
        except RvllmError:
            if time.monotonic() >= until:
                raise
            time.sleep(0.5)


def body_of(args: argparse.Namespace, model: str, one: Asked) -> dict[str, Any]:
    body: dict[str, Any] = {"model": args.served_model_name or model, "max_tokens": one.output_len,
                            "stream": True, "stream_options": {"include_usage": True}}  # fmt: skip
    chat = args.backend == "openai-chat"
    if chat:
        text = one.prompt if isinstance(one.prompt, str) else " ".join(str(i % 1000) for i in one.prompt)
        body["messages"] = [{"role": "user", "content": text}]
    else:
        body["prompt"] = one.prompt
    given = {name: getattr(args, name) for name in SAMPLING}
    body |= {name: value for name, value in given.items() if value is not None}
    if args.logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": args.logprobs} if chat else {"logprobs": args.logprobs}
    if args.ignore_eos or args.dataset_name == "random":
        body["ignore_eos"] = True
    return body | (args.extra_body or {})


def result_file(args: argparse.Namespace, traffic: Traffic, model: str, now: str) -> Path:
    """Where the result is written, by vLLM's rule."""
    folder = Path(args.result_dir)
    if args.result_filename:
        return folder / str(args.result_filename)
    rate = "inf" if math.isinf(traffic.rate) else f"{traffic.rate:g}"
    if traffic.ramp:
        rate = f"ramp-up-{traffic.ramp}-{traffic.rate:g}qps-{traffic.end:g}"
    most = f"-concurrency{args.max_concurrency}" if args.max_concurrency else ""
    name = f"{args.label or args.backend}-{rate}qps{most}-{model.rsplit('/', 1)[-1]}-{now}.json"
    return folder / name
