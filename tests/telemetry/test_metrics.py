"""The metrics page parses, and its histograms and counters say what happened."""

import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from rvllm.telemetry.metrics import Metrics, RequestTimes, metrics_page
from rvllm.telemetry.stats import STEP_TOKENS, Stats, StepKernel


def values(page: bytes) -> dict[str, float]:
    """Sample values by name and, where there are some, the labels that tell samples apart."""
    found = {}
    for family in text_string_to_metric_families(page.decode()):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")}
            key = sample.name + (str(labels) if labels else "")
            assert key not in found, key
            found[key] = sample.value
    return found


def test_a_request_feeds_every_histogram() -> None:
    metrics = Metrics("m", {"block_size": "16"})
    metrics.observe(time_to_first_token_seconds=0.5, inter_token_latency_seconds=0.02)
    metrics.finished(RequestTimes(100, 50, 2, "stop", 11, queue=0.1, first=0.5, last=1.5))
    found = values(metrics_page([(metrics, None)]))
    assert found["vllm:time_to_first_token_seconds_sum"] == 0.5
    assert found["vllm:inter_token_latency_seconds_sum"] == 0.02
    assert found["vllm:e2e_request_latency_seconds_sum"] == 1.5
    assert found["vllm:request_queue_time_seconds_sum"] == 0.1
    assert found["vllm:request_prefill_time_seconds_sum"] == pytest.approx(0.4)
    assert found["vllm:request_decode_time_seconds_sum"] == 1.0
    assert found["vllm:request_inference_time_seconds_sum"] == pytest.approx(1.4)
    assert found["vllm:request_time_per_output_token_seconds_sum"] == pytest.approx(0.1)
    assert found["vllm:request_prompt_tokens_sum"] == 100
    assert found["vllm:request_generation_tokens_sum"] == 11
    assert found["vllm:request_params_max_tokens_sum"] == 50
    assert found["vllm:request_params_n_sum"] == 2
    assert found["vllm:request_success_total{'finished_reason': 'stop'}"] == 1


@pytest.mark.parametrize(("prompt", "cached"), [(0, 0), (50, 20)])
def test_prompt_tokens_by_where_they_come_from(prompt: int, cached: int) -> None:
    found = values(
        metrics_page([(Metrics("m", {}), Stats(prompt_tokens=prompt, cached_prompt_tokens=cached))])
    )
    name = "vllm:prompt_tokens_by_source_total{'source': '%s'}"
    assert found[name % "local_compute"] == prompt - cached and found[name % "local_cache_hit"] == cached


BUCKETS = {  # of vLLM's vllm/v1/metrics/loggers.py, which its dashboards expect
    "time_to_first_token_seconds": [
        0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
        40.0,
        80.0, 160.0, 640.0, 2560.0,
    ],
    "inter_token_latency_seconds": [
        0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
        80.0,
    ],
    "e2e_request_latency_seconds": [
        0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
        960.0, 1920.0, 7680.0,
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", BUCKETS)
def test_histograms_have_vllms_buckets(name: str) -> None:
    page = metrics_page([(Metrics("m", {}), None)]).decode()
    found = re.findall(rf'^vllm:{name}_bucket{{.*le="([^"]*)"', page, re.MULTILINE)
    assert [float(bound) for bound in found] == [*BUCKETS[name], float("inf")]


def test_a_request_that_got_no_token_has_no_times() -> None:
    metrics = Metrics("m", {})
    metrics.finished(RequestTimes(100, 50, 1, "abort", 0, queue=0.0, first=0.0, last=0.0))
    found = values(metrics_page([(metrics, None)]))
    assert found["vllm:request_success_total{'finished_reason': 'abort'}"] == 1
    assert found["vllm:e2e_request_latency_seconds_count"] == 0


def test_the_engines_figures_are_a_snapshot() -> None:
    stats = Stats(
        running=3, waiting=2, blocks_total=10, blocks_used=4, generation_tokens=77, prefix_queries=9
    )
    stats.cached_prompt_tokens, stats.idle_seconds, stats.backend = 5, 1.5, {"idle_share": 0.25}
    metrics = Metrics("m", {"block_size": "16"})
    found = values(metrics_page([(metrics, stats)]))
    assert found["vllm:num_requests_running"] == 3
    assert found["vllm:num_requests_waiting"] == 2
    assert found["vllm:kv_cache_usage_perc"] == 0.4
    assert found["vllm:generation_tokens_total"] == 77
    assert found["vllm:prefix_cache_hits_total"] == 5
    assert found["rvllm:backend_idle_share"] == 0.25
    assert found["rvllm:engine_idle_seconds_total"] == 1.5
    assert "vllm:num_requests_running" not in values(metrics_page([(metrics, None)]))


def test_backend_names_that_prometheus_would_not_take_do_not_break_the_page() -> None:
    odd = Stats(backend={"graph bucket/8": 1.0})
    found = values(metrics_page([(Metrics("m", {}), odd)]))
    assert found["rvllm:backend_graph_bucket_8"] == 1.0


def test_backend_figures_may_carry_labels() -> None:
    graphs = {f'rvllm:cuda_graph_captured{{kind="decode",size="{size}"}}': 1.0 for size in (1, 8)}
    page = metrics_page([(Metrics("m", {}), Stats(backend=graphs))])
    found = values(page)
    for size in (1, 8):
        assert found[f"rvllm:backend_cuda_graph_captured{{'kind': 'decode', 'size': '{size}'}}"] == 1
    assert page.count(b"# TYPE rvllm:backend_cuda_graph_captured gauge") == 1


def test_steps_blocks_kernels_and_settings() -> None:
    counts = [0] * (len(STEP_TOKENS) + 1)
    counts[0], counts[4], counts[-1] = 5, 2, 1
    stats = Stats(
        step_tokens=20_000,
        step_counts=counts,
        blocks_total=10,
        blocks_used=4,
        blocks_cached=5,
        floor_ratio=0.875,
        mask_exposed_seconds=0.25,
        kernels=[
            StepKernel("qkv", "a", 28, "x"),
            StepKernel("qkv", "a", 2, "y"),
            StepKernel("down", "b", 28),
        ],
    )
    info = {"decode_path": "batched", "gemm_strategy": "native", "dtype": "bfloat16", "device": "H200"}
    found = values(metrics_page([(Metrics("m", {}, info), stats)]))
    assert found["vllm:iteration_tokens_total_sum"] == 20_000
    assert found["vllm:iteration_tokens_total_count"] == 8
    assert found["vllm:iteration_tokens_total_bucket{'le': '32.0'}"] == 5
    assert found["vllm:iteration_tokens_total_bucket{'le': '64.0'}"] == 7
    assert found["vllm:iteration_tokens_total_bucket{'le': '+Inf'}"] == 8
    tiers = {tier: found[f"rvllm:kv_blocks{{'tier': '{tier}'}}"] for tier in ("in use", "cached", "empty")}
    assert tiers == {"in use": 4, "cached": 5, "empty": 1}
    assert found["rvllm:decode_floor_ratio"] == 0.875
    assert found["rvllm:grammar_mask_exposed_seconds_total"] == 0.25
    assert found["rvllm:step_kernel_launches{'kernel': 'a', 'op': 'qkv'}"] == 30
    assert found["rvllm:step_kernel_launches{'kernel': 'b', 'op': 'down'}"] == 28
    assert found[f"rvllm:engine_info{dict(sorted(info.items()))}"] == 1
    assert "rvllm:decode_floor_ratio" not in values(metrics_page([(Metrics("m", {}), Stats())]))


def test_computed_and_longest() -> None:
    metrics = Metrics("m", {})
    metrics.finished(RequestTimes(100, 50, 2, "stop", 11, 0.1, 0.5, 1.5, cached_tokens=64))
    metrics.observe(request_max_num_generation_tokens=11)
    found = values(metrics_page([(metrics, None)]))
    assert found["vllm:request_prefill_kv_computed_tokens_sum"] == 36
    assert found["vllm:request_max_num_generation_tokens_sum"] == 11
