"""vLLM's settings that are none of ours: what each means here. One table for the command line and for `LLM`.

A setting is taken when its value asks for what happens anyway, becomes one of ours where there is one, and is
refused else, with what to use instead. Names are vLLM's, with underscores.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rvllm.errors import UsageError
from rvllm.settings import human_size

ANY = object()
"""Among neutral values: whatever it is, it changes no result here."""


@dataclass(frozen=True)
class VllmFlag:
    """What one of vLLM's settings means here.

    neutral: values that ask for what is done anyway. instead: what to use, for other values.
    ours: the setting of ours that takes its place, `values` in other words.
    switch: stands alone on a command line. short: its other names there.
    """

    neutral: tuple[Any, ...] = ()
    instead: str = ""
    ours: str | None = None
    values: Mapping[Any, Any] | None = None
    switch: bool = False
    short: tuple[str, ...] = ()


def _taken(*values: Any, instead: str = "", short: tuple[str, ...] = ()) -> VllmFlag:
    return VllmFlag(values or (ANY,), instead, short=short)


def _switch(*values: Any, instead: str = "") -> VllmFlag:
    return VllmFlag(values or (ANY,), instead, switch=True)


def _renamed(ours: str, values: Mapping[Any, Any] | None = None, short: tuple[str, ...] = ()) -> VllmFlag:
    return VllmFlag(ours=ours, values=values, short=short)


def _becomes(ours: str, values: Mapping[Any, Any] | None, *neutral: Any) -> VllmFlag:
    """One of ours takes its place, but where its value asks for nothing."""
    return VllmFlag(neutral, ours=ours, values=values)


_ONE_GPU = "rvLLM runs on one GPU; start one server for each and put a balancer in front"
_NO_LORA = "adapters are not supported; merge them into the model first"
_TEXT = "models take and give text alone"
_TLS = "put a proxy that speaks TLS (nginx, Caddy) in front"
_REQUEST = "send it with each request"
_NO_SPECULATION = "there is no speculative decoding"
_NO_TRANSFER = "there is no transfer of KV blocks between servers"
_NO_PLUGINS = "there are no plug-ins"
_POOLING = dict.fromkeys(("embed", "embedding", "score", "classify", "reward"), "pooling")
_QUANTISED = (
    *("gptq", "awq", "gptq_marlin", "awq_marlin", "auto-round", "inc", "compressed-tensors"),
    *("modelopt", "fbgemm_fp8", "gguf"),
)

_IGNORED = (
    "code_revision", "allowed_media_domains", "max_seq_len_to_capture", "max_cudagraph_capture_size",
    "cudagraph_capture_sizes", "renderer_num_workers", "safetensors_load_strategy",
    "safetensors_prefetch_block_size", "ignore_patterns", "pt_load_map_location", "master_addr",
    "master_port", "all2all_backend", "expert_placement_strategy", "max_parallel_loading_workers",
    "prefix_caching_hash_algo", "mamba_block_size", "kv_offloading_backend", "limit_mm_per_prompt",
    "media_io_kwargs", "mm_processor_kwargs", "mm_processor_cache_gb", "mm_processor_cache_type",
    "mm_encoder_tp_mode", "mm_encoder_attn_backend", "video_pruning_rate", "max_loras", "max_lora_rank",
    "max_cpu_loras", "lora_dtype", "lora_extra_vocab_size", "collect_detailed_traces",
    "show_hidden_metrics_for_version", "kv_cache_metrics_sample", "max_log_len", "uvicorn_log_level",
    "disable_access_log_for_endpoints", "max_num_partial_prefills", "max_long_partial_prefills",
    "num_scheduler_steps", "optimization_level", "performance_mode", "attention_backend", "attention_config",
    "kernel_config", "structured_outputs_config", "guided_decoding_backend",
    "gpu_memory_utilization_per_process", "allowed_methods", "allowed_headers",
    "h11_max_incomplete_event_size", "h11_max_header_count"
)  # fmt: skip
"""Whatever their value, they change no result here."""
_IGNORED_SWITCHES = (
    "disable_cascade_attn", "use_tqdm_on_load", "disable_custom_all_reduce", "language_model_only",
    "disable_mm_preprocessor_cache", "interleave_mm_strings", "skip_mm_profiling", "fully_sharded_loras",
    "kv_cache_metrics", "cudagraph_metrics", "enable_mfu_metrics", "disable_log_stats",
    "aggregate_engine_logging", "disable_log_requests", "enable_log_deltas", "log_error_stack",
    "disable_uvicorn_access_log", "disable_chunked_mm_input", "disable_hybrid_kv_cache_manager",
    "multi_step_stream_outputs", "use_v2_block_manager", "guided_decoding_disable_fallback",
    "enable_reasoning", "fail_on_environ_validation", "disable_frontend_multiprocessing",
    "disable_async_output_proc", "enable_auto_tool_choice", "exclude_tools_when_tool_choice_none",
    "enable_prompt_tokens_details", "enable_server_load_tracking", "enable_tokenizer_info_endpoint",
    "enable_request_id_headers", "enable_offline_docs"
)  # fmt: skip
"""The same, without a value on a command line."""

VLLM_FLAGS: dict[str, VllmFlag] = {
    **dict.fromkeys(_IGNORED, _taken()),
    **dict.fromkeys(_IGNORED_SWITCHES, _switch()),
    # the model
    "task": _becomes("runner", {**_POOLING, "generate": "generate"}, "auto", None),
    "convert": _becomes("runner", _POOLING, "auto", "none", None),
    "tokenizer_mode": _taken(
        "auto",
        "hf",
        instead="tekken.json is read, and conversations written as Mistral does, where it stands alone",
    ),
    "tokenizer_revision": _taken(None, instead="--tokenizer ORG/NAME@REVISION"),
    "trust_remote_code": _switch(),  # models bring no code of their own
    "trust_request_chat_template": _switch(False, instead="--chat-template FILE"),
    "hf_config_path": _taken(None, instead="a model directory with its own config.json"),
    "hf_token": _taken(None, True, instead="the variable HF_TOKEN"),
    "config_format": _taken("auto", "hf", instead="config.json is read"),
    "model_impl": _taken("auto", "vllm", instead="the architectures in `rvllm info`"),
    "allowed_local_media_path": _taken(None, "", instead=_TEXT),
    "enforce_eager": _switch(),  # graphs change no result
    "logprobs_mode": _taken("raw_logprobs", instead="log-probabilities are those before penalties"),
    "disable_sliding_window": _switch(False, instead="--max-model-len up to the window"),
    "enable_prompt_embeds": _switch(False, instead="prompts are text or token ids"),
    "override_pooler_config": _becomes("pooler_config", None, None, {}),
    "override_generation_config": _taken(None, {}, instead=_REQUEST),
    "override_neuron_config": _taken(None, {}, instead="--device cuda or cpu"),
    "logits_processor_pattern": _taken(None, instead="logit_bias in requests"),
    "logits_processors": _taken(None, [], instead="logit_bias in requests"),
    **dict.fromkeys(("io_processor_plugin", "scheduler_cls"), _taken(None, instead=_NO_PLUGINS)),
    "override_attention_dtype": _taken(None, instead="--dtype"),
    # loading
    "download_dir": _taken(None, instead="the variable RVLLM_CACHE_DIR"),
    "model_loader_extra_config": _taken(None, {}, instead="there is one loader"),
    # many devices
    "tensor_parallel_size": _taken(1, instead=_ONE_GPU, short=("-tp",)),
    "pipeline_parallel_size": _taken(1, instead=_ONE_GPU, short=("-pp",)),
    "data_parallel_size": _taken(1, instead=_ONE_GPU, short=("-dp",)),
    "decode_context_parallel_size": _taken(1, instead=_ONE_GPU, short=("-dcp",)),
    "prefill_context_parallel_size": _taken(1, instead=_ONE_GPU, short=("-pcp",)),
    "data_parallel_rank": _taken(None, 0, instead=_ONE_GPU, short=("-dpn",)),
    "data_parallel_start_rank": _taken(None, 0, instead=_ONE_GPU, short=("-dpr",)),
    "data_parallel_size_local": _taken(None, 1, instead=_ONE_GPU, short=("-dpl",)),
    "data_parallel_address": _taken(None, instead=_ONE_GPU, short=("-dpa",)),
    "data_parallel_rpc_port": _taken(None, instead=_ONE_GPU, short=("-dpp",)),
    "data_parallel_backend": _taken("mp", instead=_ONE_GPU, short=("-dpb",)),
    **dict.fromkeys(("data_parallel_hybrid_lb", "data_parallel_external_lb", "enable_dbo", "enable_eplb",
                    "headless"), _switch(False, instead=_ONE_GPU)),
    "distributed_executor_backend": _taken(None, "uni", "mp", instead=_ONE_GPU),
    "nnodes": _taken(1, instead=_ONE_GPU, short=("-n",)),
    "node_rank": _taken(0, instead=_ONE_GPU, short=("-r",)),
    "enable_expert_parallel": _switch(),  # with one GPU every expert is there
    "eplb_config": _taken(None, {}, instead=_ONE_GPU),
    "ray_workers_use_nsight": _switch(False, instead="nsys on the server itself"),
    "worker_cls": _taken("auto", instead=_NO_PLUGINS),
    "worker_extension_cls": _taken("", instead=_NO_PLUGINS),
    "api_server_count": _taken(None, 1, instead="one process answers all requests", short=("-asc",)),
    # the cache
    "block_size": _taken(16, None, instead="blocks are of 16 tokens"),
    "kv_cache_memory_bytes": _renamed("kv_cache_memory_gb"),
    "num_gpu_blocks_override": _renamed("num_blocks"),
    "swap_space": _taken(),  # see --num-cpu-blocks
    "cpu_offload_gb": _taken(0, instead="a quantised checkpoint; weights stay on the GPU"),
    "calculate_kv_scales": _switch(),  # an FP8 cache has a scale for each token and head
    "kv_sharing_fast_prefill": _switch(False, instead="prompts are computed in full"),
    "mamba_cache_dtype": _taken("auto", instead="states are float32"),
    "mamba_ssm_cache_dtype": _taken("auto", "float32", instead="states are float32"),
    "mamba_cache_mode": _taken("none", "align", "all", instead="--num-state-snapshots"),
    "kv_offloading_size": _taken(None, 0, instead="--num-cpu-blocks"),
    "enable_kv_cache_events": _switch(False, instead="--kv-events-config JSON"),
    # pictures and sound
    "enable_mm_embeds": _switch(False, instead=_TEXT),
    # adapters
    "enable_lora": _switch(False, instead=_NO_LORA),
    **dict.fromkeys(("lora_modules", "default_mm_loras", "prompt_adapters"), _taken(None, instead=_NO_LORA)),
    # what is seen
    "otlp_traces_endpoint": _renamed("otlp_endpoint"),
    "enable_layerwise_nvtx_tracing": _switch(False, instead="rvllm plan and rvllm trace"),
    "enable_logging_iteration_details": _switch(False, instead="rvllm top"),
    "enable_log_requests": VllmFlag(ours="access_log", switch=True),
    "enable_log_outputs": _switch(False, instead="--access-log; texts are never logged"),
    "log_config_file": _taken(None, instead="--log-level"),
    # scheduling
    "enable_chunked_prefill": _switch(True, None, instead="prompts are always computed in chunks"),
    "long_prefill_token_threshold": _renamed("max_prefill_chunk", {0: None, "0": None}),
    "max_num_scheduled_tokens": _renamed("max_num_batched_tokens"),
    "async_scheduling": _switch(),  # steps are always launched ahead
    "stream_interval": _taken(1, instead="every token is sent when it comes"),
    "scheduler_delay_factor": _taken(0, instead="requests start at once"),
    "num_lookahead_slots": _taken(0, instead=_NO_SPECULATION),
    # the rest of the engine
    "speculative_config": _taken(None, {}, instead=_NO_SPECULATION),
    "speculative_model": _taken(None, instead=_NO_SPECULATION),
    "num_speculative_tokens": _taken(None, 0, instead=_NO_SPECULATION),
    "kv_transfer_config": _taken(None, instead=_NO_TRANSFER),
    "ec_transfer_config": _taken(None, instead=_NO_TRANSFER),
    "compilation_config": VllmFlag((ANY,), short=("-O", "-cc")),  # nothing is compiled at run time
    "additional_config": _taken(None, {}, instead="flags of their own"),
    "profiler_config": _taken(None, {}, instead="rvllm benchmark and rvllm trace"),
    "guided_decoding_disable_any_whitespace": _switch(False, instead="disable_any_whitespace in requests"),
    "reasoning_config": _taken(None, {}, instead="--reasoning-parser"),
    "reasoning_parser_plugin": _taken("", None, instead=_NO_PLUGINS),
    "shutdown_timeout": _renamed("drain_timeout"),
    # the server
    "tool_parser_plugin": _taken("", None, instead=_NO_PLUGINS),
    "tool_server": _taken(None, instead="tools are run by clients"),
    "chat_template_content_format": _taken(),  # the template itself is asked
    "default_chat_template_kwargs": _taken(None, {}, instead="chat_template_kwargs in requests"),
    "response_role": _taken("assistant", instead="answers are the assistant's"),
    "return_tokens_as_token_ids": _switch(False, instead=_REQUEST),
    "enable_force_include_usage": _switch(False, instead="stream_options in requests"),
    "enable_response_messages": _switch(False, instead="the conversation's items"),
    "allow_credentials": _switch(False, instead="keys are sent in headers, never in cookies"),
    "uds": _taken(None, instead="--host and --port"),
    "grpc": _switch(False, instead="HTTP"),
    **dict.fromkeys(("ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_ciphers"), _taken(None,
                    instead=_TLS)),
    "ssl_cert_reqs": _taken(None, 0, instead=_TLS),
    "enable_ssl_refresh": _switch(False, instead=_TLS),
    "root_path": _taken(None, "", instead="a proxy that takes the prefix off"),
    "middleware": _taken(None, [], instead="a proxy in front"),
    "disable_fastapi_docs": _switch(False, instead="a proxy that keeps /docs to itself"),
    "tokens_only": _switch(False, instead="--skip-tokenizer-init"),
}  # fmt: skip

# Values of our own settings in vLLM's words.
VLLM_VALUES: dict[str, dict[Any, Any]] = {
    "dtype": {"half": "float16", "float": "float32"},
    "load_format": dict.fromkeys(("safetensors", "hf", "gguf", "fastsafetensors"), "auto"),
    "generation_config": {"vllm": "none"},
    "max_model_len": {"-1": None, -1: None},
    # What a checkpoint is quantised as is read from it.
    "quantization": {**dict.fromkeys(_QUANTISED, "auto"), None: "auto"},
    "device": {"cuda:0": "cuda"},
    "kv_cache_dtype": {"bfloat16": "bf16", "float16": "fp16", "fp8_e4m3": "fp8"},
    "log_level": {"warn": "warning", "critical": "error", "trace": "debug"},
}


def settle(name: str, value: Any, spelled: str) -> tuple[str, Any] | None:
    """(setting of ours, its value) that takes a vLLM setting's place; None for one that asks for nothing.

    spelled: the setting as the user wrote it, up to its value, for the message.
    Raises UsageError for a value that asks for what we do not do, naming what to use instead.
    """
    known = VLLM_FLAGS[name]
    if known.ours is not None and any(_same(neutral, value) for neutral in known.neutral):
        return None
    if known.ours is not None:
        if name == "kv_cache_memory_bytes" and value is not None:
            value = human_size(str(value)) / 1e9
        return known.ours, (known.values or {}).get(value, value)
    if any(neutral is ANY or _same(neutral, value) for neutral in known.neutral):
        return None
    raise UsageError(f"{spelled}{_shown(value)} is not supported: {known.instead}")


def _same(neutral: Any, value: Any) -> bool:
    """Equal, also as a command line or a YAML file has it."""
    if isinstance(value, str) and not isinstance(neutral, str):
        text = value.strip()
        if neutral is None:
            return text.lower() in ("none", "null", "")
        try:
            value = json.loads(text.lower() if text.lower() in ("true", "false") else text)
        except ValueError:
            return False
    if isinstance(neutral, bool) or isinstance(value, bool):
        return neutral is value
    return bool(neutral == value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def check_wake_up_tags(tags: Iterable[str]) -> None:
    """Raises UsageError where vLLM's tags of `wake_up` name a part of what `sleep` gave back."""
    named = set(tags)
    if named and named != {"weights", "kv_cache"}:
        raise UsageError(
            f"tags {', '.join(sorted(named))[:80]}: weights and kv_cache are taken again together; "
            "leave tags out, or name both"
        )
