"""Nothing in deploy/ asks for what the metrics page does not have: dashboard, autoscaling, roll-outs."""

import json
import re
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from rvllm.telemetry.metrics import Metrics, RequestTimes, metrics_page
from rvllm.telemetry.stats import Stats, StepKernel

DASHBOARD = Path(__file__).parent.parent.parent / "deploy" / "grafana-dashboard.json"
NAME = re.compile(r"\br?vllm:\w+")
# What boards made for vLLM look at; docs.vllm.ai, "Production Metrics".
VLLM = {
    "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc",
    "vllm:num_preemptions_total", "vllm:prompt_tokens_total", "vllm:generation_tokens_total",
    "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total", "vllm:request_success_total",
    "vllm:time_to_first_token_seconds_bucket", "vllm:inter_token_latency_seconds_bucket",
    "vllm:request_time_per_output_token_seconds_bucket", "vllm:e2e_request_latency_seconds_bucket",
    "vllm:request_queue_time_seconds_bucket", "vllm:request_prefill_time_seconds_bucket",
    "vllm:request_decode_time_seconds_bucket", "vllm:request_inference_time_seconds_bucket",
    "vllm:request_prompt_tokens_bucket", "vllm:request_generation_tokens_bucket",
    "vllm:request_params_max_tokens_bucket", "vllm:request_params_n_bucket", "vllm:cache_config_info",
    "vllm:iteration_tokens_total_bucket", "vllm:iteration_tokens_total_sum",
    "vllm:iteration_tokens_total_count", "vllm:request_max_num_generation_tokens_bucket",
    "vllm:request_prefill_kv_computed_tokens_bucket",
}  # fmt: skip


def names_on_the_page() -> set[str]:
    metrics = Metrics("m", {"block_size": "16"})
    metrics.response("/v1/chat/completions", 200)
    metrics.finished(RequestTimes(100, 50, 2, "stop", 11, queue=0.1, first=0.5, last=1.5))
    gpu = {"rvllm:decode_idle_share": 0.01, 'rvllm:cuda_graph_captured{kind="decode",size="8"}': 1.0}
    kernels = [StepKernel("qkv", "gemm_sm90_bf16", 28)]
    page = metrics_page([(metrics, Stats(running=1, backend=gpu, floor_ratio=0.9, kernels=kernels))]).decode()
    return {sample.name for family in text_string_to_metric_families(page) for sample in family.samples}


def test_vllms_names_are_there() -> None:
    assert names_on_the_page() >= VLLM


def test_every_query_has_its_metric() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    asked = {name for expression in expressions for name in NAME.findall(expression)}
    assert len(asked) > 15
    assert asked <= names_on_the_page()


def test_autoscaling_and_rollouts_ask_for_what_there_is() -> None:
    files = [path for path in DASHBOARD.parent.rglob("*") if path.suffix in (".yaml", ".yml", ".py")]
    asked = {name for path in files for name in NAME.findall(path.read_text())}
    asked -= {"rvllm:cpu", "rvllm:cuda"}  # images
    assert asked >= {"vllm:num_requests_running", "vllm:num_requests_waiting", "rvllm:http_responses_total"}
    (adapters,) = re.findall(r"hpaMetric: (\w+)", (DASHBOARD.parent / "helm/rvllm/values.yaml").read_text())
    asked.add(adapters.replace("_", ":", 1))  # an adapter's name has no colon
    assert asked <= names_on_the_page()


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken and at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells
