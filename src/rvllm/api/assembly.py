"""From settings to what the application needs: tokenizer, workers, service and gate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rvllm.config import EngineConfig, ServerConfig
from rvllm.errors import RvllmError, UsageError
from rvllm.settings import read_text

if TYPE_CHECKING:
    from rvllm.api.generate.generation import Engine, Service
    from rvllm.api.http.exchange import Gate
    from rvllm.engine.ipc.messages import Ready
    from rvllm.text.tokenizers.tokenizer import Tokenizer
    from rvllm.text.worker.pool import WorkerPool


def template_text(file: str | None) -> str | None:
    """The text of `--chat-template`, which may be the template itself. Raises UsageError."""
    if file is None or "{{" in file or "{%" in file:
        return file
    return read_text("--chat-template", file)


def load_tokenizer(config: EngineConfig) -> Tokenizer | None:
    """The model's tokenizer; None with --skip-tokenizer-init."""
    if config.skip_tokenizer_init:
        return None
    from rvllm.text.tokenizers.tokenizer import Tokenizer

    return Tokenizer.load(Path(config.tokenizer or config.model))


def start_workers(config: EngineConfig, server: ServerConfig) -> WorkerPool | None:
    """Processes for work on what clients send, which begin to load; None without a tokenizer."""
    from rvllm.text.worker.pool import WorkerPool, worker_count

    if config.skip_tokenizer_init:
        return None
    pool = WorkerPool(
        config.model,
        count=worker_count(server.workers),
        seconds=server.worker_timeout,
        memory=int(server.worker_memory_mb * 1e6),
    )
    pool.start()
    return pool


async def check_chat_template(work: WorkerPool, template: str | None, tool_call_parser: str) -> None:
    """Tries a template, which is somebody's code, where it may be killed, before it runs here.

    template: None is the model's own. Raises UsageError.
    """
    from rvllm.text.worker.tasks import check_template, try_template

    flag = "the model's chat template" if template is None else "--chat-template"
    try:
        if template is not None:
            await work.run(check_template, flag, len(template), template)
        await work.run(try_template, flag, 0, template, tool_call_parser)
    except RvllmError as error:
        raise UsageError(f"{flag}: {str(error).removeprefix(f'{flag}: ')}") from None


def service_of(
    engine: Engine,
    ready: Ready,
    engine_config: EngineConfig,
    config: ServerConfig,
    tokenizer: Tokenizer | None,
    work: WorkerPool | None,
    template: str | None,
    number: int = 0,
) -> Service:
    """The loaded model as handlers see it. number: which of those behind one address it is."""
    from rvllm.api.generate.generation import Service
    from rvllm.telemetry.metrics import Metrics
    from rvllm.text.requests import RequestMaker

    names = config.served_model_name or engine_config.model
    name = names.partition("\n")[0]
    metrics = Metrics(
        name,
        {
            "block_size": str(ready.limits.block_size),
            "num_gpu_blocks": str(ready.limits.num_blocks),
            "num_cpu_blocks": str(engine_config.num_cpu_blocks),
            "enable_prefix_caching": str(engine_config.enable_prefix_caching),
            "gpu_memory_utilization": str(engine_config.gpu_memory_utilization),
        },
        _engine_info(engine_config, ready.backend, ready.facts.dtype),
        number,
    )
    return Service(
        engine,
        ready,
        tokenizer,
        config,
        metrics,
        served_name=names,
        requests=RequestMaker(ready.facts, engine_config.seed, tokenizer),
        chat_template=template,
        work=work,
        shown_settings=_shown_settings(engine_config, ready.backend),
    )


def build_gate(config: ServerConfig, services: Sequence[Service]) -> Gate:
    """What all endpoints share, of all models behind one address; they know of each other from here on."""
    from rvllm.api.http.exchange import Gate
    from rvllm.telemetry.tracing import Tracer

    first, endpoint = services[0], config.otlp_endpoint
    tracer = None if endpoint is None else Tracer(endpoint, first.served_name)
    gate = Gate(config, first.metrics, tracer=tracer)
    for service in services:
        service.siblings = tuple(services)
        gate.restarted.append(service.forget_vocabulary)
    if gate.tracer is not None:
        gate.closing.append(gate.tracer.close)
    return gate


def _shown_settings(config: EngineConfig, backend: str) -> dict[str, str]:
    """What the page shows of the settings: how matrices and decode steps are computed."""
    shown = {"prefix caching": "on" if config.enable_prefix_caching else "off"}
    if backend == "cpu":
        return {"CPU kernels": config.cpu_kernels, **shown}
    return {
        "decode path": config.decode_path,
        "GEMM strategy": config.gemm_strategy,
        "capture graphs": config.capture_graphs,
        **shown,
    }


def _engine_info(config: EngineConfig, backend: str, dtype: str) -> dict[str, str]:
    """What computes a step, as labels of a metric."""
    shared = {"device": backend, "dtype": dtype}
    if backend == "cpu":
        return {**shared, "decode_path": "cpu", "gemm_strategy": config.cpu_kernels}
    return {
        **shared,
        "decode_path": config.decode_path,
        "gemm_strategy": config.gemm_strategy,
        "capture_graphs": config.capture_graphs,
    }
