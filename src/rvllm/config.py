"""Every flag and environment variable, once: name, type, default, range and help.

The dataclasses below are the only place where a setting is declared. The command line, the README's
table, environment variables (`RVLLM_` + the field's name in capitals, unless a field names its own),
validation and `rvllm info` are all derived from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rvllm.settings import build, env_of, setting, settings_of


@dataclass(frozen=True)
class EngineConfig:
    """What model runs, where, and within which limits."""

    model: str = setting(
        "smollm2-135m",
        "Model: a directory, a .gguf file, org/name[@revision][:file.gguf], or the alias smollm2-135m.",
        short="-m",
    )
    tokenizer: str | None = setting(None, "Another model to take the tokenizer from.")
    revision: str | None = setting(None, "The model's branch, tag or commit, as in org/name@revision.")
    runner: str = setting(
        "auto",
        "What the model is for; auto: as its files say; pooling makes vectors of a model that generates.",
        choices=("auto", "generate", "pooling"),
    )
    hf_overrides: str | None = setting(
        None, "JSON object whose entries take the place of config.json's.", metavar="JSON"
    )
    pooler_config: str | None = setting(
        None,
        "JSON object: pooling_type (LAST, MEAN, CLS) and normalize, instead of what the model's files say.",
        metavar="JSON",
    )
    device: str = setting(
        "auto",
        "Where to run; auto takes the GPU if there is one and says so.",
        choices=("auto", "cuda", "cpu"),
    )
    dtype: str = setting(
        "auto",
        "Element type of weights and activations; auto: float32 on the CPU, the checkpoint's 16-bit type on a GPU.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    quantization: str = setting(
        "auto",
        "Weights on a GPU; auto keeps quantised ones as the checkpoint has them where there are kernels, none expands them to 16 bits, fp8 and int4 (groups of 128, rounded to the nearest) quantise a 16-bit checkpoint as it is loaded.",
        choices=("auto", "none", "fp8", "int4"),
    )
    load_format: str = setting(
        "auto",
        "auto reads the checkpoint's weights; dummy fills random ones (for measurements, needs only config.json).",
        choices=("auto", "dummy"),
    )
    skip_tokenizer_init: bool = setting(False, "Take and give token ids only; no tokenizer is loaded.")
    max_model_len: int | None = setting(
        None,
        "Longest sequence, prompt and output, in tokens; default: what the model allows and memory holds.",
        low=1,
    )
    max_num_seqs: int = setting(256, "Most sequences running at once.", low=1, high=65536)
    max_num_batched_tokens: int | None = setting(
        None,
        "Most tokens one step computes, decodes and prefill chunks together; default: 512 on the CPU, 8192 on a GPU.",
        low=1,
        high=1 << 20,
    )
    max_mixed_tokens: int | None = setting(
        None,
        "Most tokens of a step in which sequences decode, prompts included, which delay their next token; default: on a GPU 2048, or up to 4096 where whole rounds of tiles make tokens cheaper (the start says it), on the CPU --max-num-batched-tokens.",
        low=1,
    )
    max_prefill_chunk: int | None = setting(
        None, "Most tokens of one prompt that a step computes; default: as many as the step holds.", low=16
    )
    max_prefill_delay_ms: float = setting(
        0.0,
        "Milliseconds that prompts may add to a step in which others decode, by what prompts have cost so far; 0: no bound.",
        low=0.0,
    )
    scheduling_policy: str = setting(
        "priority",
        "Who is served first: fcfs by arrival, priority by the requests' priority (lower first) and then by arrival, sjf who has the fewest tokens left. Only priority takes requests with a priority and runs batches behind all others.",
        choices=("fcfs", "priority", "sjf"),
    )
    aging_seconds: float = setting(
        60.0,
        "Seconds of waiting that outweigh one level of priority, or 1024 tokens under sjf; 0: no waiting does.",
        low=0.0,
    )
    fairness: str = setting(
        "none",
        "Serve clients in turn, who was given the fewest tokens first: by api-key or by the requests' user. The policy then orders the requests of one client.",
        choices=("none", "api-key", "user"),
    )
    max_queue_seconds: float = setting(
        0.0, "Seconds after which a request that has not begun is answered 429; 0: it waits on.", low=0.0
    )
    enable_prefix_caching: bool = setting(True, "Reuse the KV blocks of equal prompt prefixes.")
    kv_events_config: str | None = setting(
        None,
        "Tell routers what the prefix cache keeps, in vLLM's ZMQ format; vLLM's settings as JSON: enable_kv_cache_events, endpoint, replay_endpoint, topic, buffer_steps, hwm; and event_format: map, or array for routers of before vLLM 0.24.",
        metavar="JSON",
    )
    kv_cache_dtype: str = setting(
        "auto",
        "Type of the cached keys and values; auto: the model's. fp8 takes half the memory, decodes long contexts faster and short ones a little slower: E4M3 with a power of two for each token and head, without calibration.",
        choices=("auto", "bf16", "fp16", "fp8"),
    )
    num_blocks: int | None = setting(
        None,
        "KV blocks of 16 tokens on the device that runs the model; default: as many as the memory flags leave room for, on the CPU no more than could be used at once.",
        low=1,
    )
    num_cpu_blocks: int = setting(
        0,
        "KV blocks in host memory, beside those of the device: prefixes and preempted sequences move there when their place is needed, and come back; 0: they are computed again.",
        low=0,
    )
    num_state_snapshots: int | None = setting(
        None,
        "For models with recurrent layers: states kept at block borders, from which prompts with the same beginning go on; default: up to 64, from a fifth of the memory for states on; 0: every prompt is computed whole.",
        low=0,
    )
    preemption_mode: str = setting(
        "auto",
        "What happens to the blocks of a sequence that must wait, where there is host memory for them: swap moves them there, recompute forgets them, auto compares what both cost.",
        choices=("auto", "swap", "recompute"),
    )
    kv_cache_memory_gb: float | None = setting(
        None,
        "Memory for the KV cache in GB; default: on the CPU a quarter of what is free, at most 4.",
        low=0.0,
    )
    gpu_memory_utilization: float = setting(0.90, "Share of the GPU's memory to take.", low=0.01, high=1.0)
    gpu_memory_share: float | None = setting(
        None,
        "Share of the GPU's memory that this server takes, whatever others have in use: in place of --gpu-memory-utilization, for several servers on one GPU.",
        low=0.01,
        high=1.0,
    )
    gpu_memory_reserve_gb: float = setting(
        0.0, "GB of GPU memory that stay free, even where that share would take them.", low=0.0
    )
    num_gpu_blocks: int | None = setting(None, "Another name of --num-blocks.", low=1, same_as="num_blocks")
    gemm_strategy: str = setting(
        "native",
        "Matrix kernels on a GPU: ours, cuBLASLt's, those built from CUTLASS, hybrid: cuBLASLt for QKV, O and down, CUTLASS for gate and up with their activation, or auto: per shape the fastest, measured at a model's first start. native and cutlass give a request the same bits in any batch, cublas and hybrid do not, auto does unless it chooses cuBLASLt.",
        choices=("native", "cublas", "cutlass", "hybrid", "auto"),
        env="RVLLM_BATCHED_GEMM_STRATEGY",
    )
    decode_path: str = setting(
        "batched",
        "Decode kernels on a GPU for one sequence alone: those of any batch, matrix-vector kernels, these with the norms in front taken in, or with neighbouring products in one launch too; all draw the same tokens. fp8: batched, with weights quantised as by --quantization fp8.",
        choices=("batched", "gemv", "fused", "persistent", "fp8"),
        switches=(
            ("RVLLM_FP8_WEIGHTS", "1", "fp8"),
            ("RVLLM_BATCHED_DECODE_1", "0", "gemv"),
            ("RVLLM_CUBLAS_DECODE", "0", "gemv"),
        ),
    )
    capture_graphs: str = setting(
        "lazy",
        "Capture graphs of steps on first use and while a server has nothing to do, or all at start.",
        choices=("lazy", "eager"),
    )
    check_weights: bool = setting(
        False, "Refuse a checkpoint with infinite numbers or none (NaN) among its F32, F16 and BF16 weights."
    )
    check_device_memory: bool = setting(
        False, "Debugging: end with an error if a step takes GPU memory after the start."
    )
    trace_steps: str | None = setting(
        None,
        "File to append every step of the engine to: what it was and where its time went, JSON, one line a step; rvllm trace FILE adds it up.",
        metavar="FILE",
    )
    max_logprobs: int = setting(
        20, "Most log-probabilities that a request may ask for, for each token; -1: all.", low=-1
    )
    enable_sleep_mode: bool = setting(
        False,
        "Take POST /sleep and /wake_up, which give the engine's memory back and take it again; requests wait meanwhile.",
    )
    generation_config: str = setting(
        "auto",
        "auto takes sampling defaults from the model's generation_config.json; none ignores it.",
        choices=("auto", "none"),
    )
    seed: int = setting(0, "Seed of the engine: of dummy weights and of requests that bring none.", low=0)
    threads: int | None = setting(
        None, "CPU threads for matrix products; default: the machine's cores.", low=1
    )
    cpu_kernels: str = setting(
        "auto",
        "Kernels on the CPU: numpy, or compiled ones that work on GGUF blocks; auto takes these where the package has them for the processor, and says so.",
        choices=("auto", "numpy", "compiled"),
    )

    @property
    def gpu_quantization(self) -> str:
        """What a GPU keeps weights in: `quantization`, or what the decode path asks for."""
        return "fp8" if self.decode_path == "fp8" and self.quantization == "auto" else self.quantization

    def __post_init__(self) -> None:
        if self.revision is not None:
            name, colon, file = self.model.partition(":")
            object.__setattr__(self, "model", f"{name.partition('@')[0]}@{self.revision}{colon}{file}")
            object.__setattr__(self, "revision", None)
        if self.num_gpu_blocks is not None:
            object.__setattr__(self, "num_blocks", self.num_gpu_blocks)
            object.__setattr__(self, "num_gpu_blocks", None)


@dataclass(frozen=True)
class ServerConfig:
    """How the server listens and what it accepts."""

    host: str = setting(
        "127.0.0.1", "Address to bind; read 'Before you open it up' in the README before changing it."
    )
    port: int = setting(8000, "Port to bind.", low=0, high=65535)
    served_model_name: str | None = setting(
        None,
        "Names clients use for the model, answers say the first; default: the value of --model.",
        many=True,
    )
    allowed_hosts: str | None = setting(
        None,
        "Names, separated by commas, that the Host header may have; * for any; default: loopback names and addresses when bound to loopback, else any.",
        metavar="HOSTS",
    )
    allowed_origins: str | None = setting(
        None,
        "Origins of web pages, separated by commas, that may use the server (https://app.example); * for any; default: only its own page.",
        metavar="ORIGINS",
    )
    api_key: str | None = setting(
        None,
        "Require this bearer token, but for /health, /metrics and /version.",
        secret=True,
        many=True,
        other_env="VLLM_API_KEY",
    )
    api_key_file: str | None = setting(
        None, "File with one accepted key a line; with --api-key, that one is accepted too."
    )
    chat_template: str | None = setting(None, "File with a Jinja chat template, instead of the model's own.")
    tool_call_parser: str = setting(
        "auto",
        "How the model writes tool calls; auto: as its chat template shows.",
        choices=(
            "auto", "none", "deepseek_v3", "deepseek_v31", "kimi_k2", "mistral_args", "mistral",
            "command_r", "cohere", "cohere_command3", "cohere_command4", "command_r_action",
            "deepseek_v32", "deepseek_v4", "minicpm5", "hy_v3", "gemma4", "functiongemma", "gigachat3",
            "gigachat31", "longcat", "internlm", "apertus", "olmo3", "minimax_m2", "minimax", "seed_oss",
            "qwen3_coder", "qwen3_xml", "qwen3_coder_xml", "nemotron3", "mimo", "step3p5", "glm45",
            "glm47", "glm", "poolside_v1", "nemotron_json", "llama_nemotron_json", "hunyuan_a13b",
            "jamba", "minimax_m1", "phi4_mini_json", "phi4", "phi4_marked", "granite", "granite_20b_fc",
            "granite-20b-fc", "hermes", "qwen", "granite4", "functionary_v31", "llama3_function", "lfm2",
            "llama4_pythonic", "pythonic", "xlam", "llama3_json", "llama3", "llama4_json",
        ),
    )  # fmt: skip
    reasoning_parser: str = setting(
        "auto",
        "How the model marks its thoughts, which answers carry as reasoning_content; auto: as its chat template shows.",
        choices=(
            "auto", "none", "think", "mistral", "command-r", "seed_oss", "gemma4", "hy_v3", "minimax_m3",
            "deepseek_r1", "qwen3", "deepseek_v3", "glm45", "kimi_k2", "olmo3", "ernie45", "holo2",
            "glm47", "mimo", "deepseek_v4", "poolside_v1", "cohere", "cohere_command3", "cohere_command4",
            "minimax_m2", "step3", "step3p5", "nemotron_v3",
        ),
    )  # fmt: skip
    workers: int | None = setting(
        None,
        "Processes that render, tokenise and compile what clients send; default: half the cores, 2 to 4.",
        low=2,
        high=64,
    )
    worker_timeout: float = setting(
        5.0,
        "Seconds of a processor that one such piece of work may take; then its process is killed, as it is "
        "after four times as many on the clock.",
        low=0.1,
    )
    worker_memory_mb: float = setting(
        1024.0, "MB that one such piece of work may take; then its process ends.", low=64.0
    )
    max_body_mb: float = setting(16.0, "Largest request body in MB.", low=0.001)
    max_inflight_mb: float = setting(
        256.0, "MB of all bodies being received or worked on; beyond that, 503.", low=0.001
    )
    max_head_kb: float = setting(
        64.0,
        "Largest request line with its headers, and largest trailers or extensions of a chunk, in KB.",
        low=1.0,
    )
    max_connections: int = setting(4096, "Connections open at once; more are answered 503.", low=1)
    max_connections_per_client: int = setting(2048, "Connections open at once from one address.", low=1)
    header_timeout: float = setting(30.0, "Seconds that a client has to send its headers.", low=0.1)
    body_timeout: float = setting(
        60.0, "Seconds that a client has to send its body, and one more for each 64 KB.", low=0.1
    )
    write_timeout: float = setting(
        30.0, "Seconds that a client may leave an answer unread; then it is hung up on.", low=0.1
    )
    keep_alive_timeout: float = setting(
        75.0, "Seconds that a connection may wait for its next request.", low=1.0
    )
    max_unread_tokens: int = setting(
        4096, "Tokens of a choice that may wait for a slow client; then its request is aborted.", low=16
    )
    max_queue: int = setting(1024, "Requests that may wait; more are answered 429.", low=1)
    max_choices: int = setting(16, "Largest n (or prompts times n) of one request.", low=1)
    drain_timeout: float = setting(30.0, "Seconds that SIGTERM leaves running requests to finish.", low=0.0)
    model_turn_seconds: float = setting(
        5.0,
        "With several models: seconds after which the one that has the device takes no more requests while others wait for another; those that it has are finished first.",
        low=0.0,
    )
    request_timeout: float = setting(0.0, "Seconds until a request is cancelled; 0: never.", low=0.0)
    dead_engine_timeout: float = setting(
        10.0,
        "Seconds the server still answers (with errors) after its engine died; then it exits with 1.",
        low=0.0,
    )
    engine_stall_seconds: float = setting(
        120.0,
        "Seconds of silence, while there is work, after which /health says that the engine is stalled.",
        low=0.5,
    )
    restart_engine: bool = setting(
        False, "Start the engine again when it has died or stalled, up to 3 times in 10 minutes."
    )
    log_level: str = setting("info", "How much to log.", choices=("debug", "info", "warning", "error"))
    access_log: bool = setting(False, "Log every request.")
    otlp_endpoint: str | None = setting(
        None,
        "Send OpenTelemetry spans of every request to this collector, OTLP over HTTP (extra otel): http://127.0.0.1:4318.",
        metavar="URL",
    )
    responses_db: str = setting(
        ":memory:",
        "SQLite file that keeps responses and conversations; :memory: forgets them when the server ends.",
    )
    responses_ttl_hours: float = setting(
        720.0, "Hours after which an unchanged response or conversation is forgotten; 0: never.", low=0.0
    )
    responses_max_mb: float = setting(
        256.0, "MB of responses and conversations to keep; the oldest make room.", low=0.001
    )
    files_dir: str | None = setting(
        None,
        "Folder for uploaded files and batches, which go on there after a restart; default: one that is deleted when the server ends.",
    )
    max_file_mb: float = setting(100.0, "Largest file to upload in MB.", low=0.001)
    files_max_mb: float = setting(
        2048.0, "MB of files to keep in all; beyond that uploads are refused.", low=0.001
    )
    batch_concurrency: int | None = setting(
        None, "Requests of batches that run at once; default: half of --max-num-seqs.", low=1
    )


@dataclass(frozen=True)
class SourceConfig:
    """Where models are fetched from and kept. These have no flags, only environment variables."""

    cache_dir: str = setting(
        "~/.cache/rvllm", "Folder for fetched models, packed weights, compiled kernels and measurements."
    )
    packed_cache_gb: float = setting(
        8.0, "GB of weights kept as the CPU's kernels want them, for faster starts; 0: none.", low=0
    )
    offline: bool = setting(False, "Never use the network (HF_HUB_OFFLINE does the same for the hub).")


@dataclass
class AttentionConfig:
    """vLLM's setting of its attention kernels: taken, and without effect here."""

    backend: Any = None


def unknown_variables(environ: Mapping[str, str]) -> dict[str, str | None]:
    """Variables named like ours that no setting reads, each with the known one that it may be a slip of.

    Those of the tests, RVLLM_TEST_..., are left out, and what Kubernetes sets for a service named rvllm.
    """
    settings = [pair for c in (EngineConfig, ServerConfig, SourceConfig) for pair in settings_of(c)]
    known = {env_of(f.name, s) for f, s in settings} | {name for _, s in settings for name, *_ in s.switches}
    others = ("RVLLM_TEST_", "RVLLM_SERVICE_", "RVLLM_PORT_")
    ours = sorted(n for n in environ if n.startswith("RVLLM_") and not n.startswith(others))
    strange = [name for name in ours if name not in known]
    if not strange:
        return {}
    from difflib import get_close_matches

    return {name: next(iter(get_close_matches(name, known, n=1, cutoff=0.8)), None) for name in strange}


def kernel_cache_dir() -> Path:
    """Where compiled kernels are kept."""
    return Path(build(SourceConfig, {}).cache_dir).expanduser() / "kernels"
