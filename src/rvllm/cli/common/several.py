"""`--model` given several times: what each of the models is served with."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

from rvllm.config import EngineConfig, ServerConfig
from rvllm.errors import UsageError
from rvllm.settings import build, flag_of, settings_of

OF_ONE_MODEL = ("tokenizer", "revision", "hf_overrides", "pooler_config", "kv_events_config", "chat_template",
                "trace_steps")  # fmt: skip
CONTEXT_GB = 1.0  # of GPU memory that a sleeping engine keeps: its context, kernels and graphs


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Declares `--model`, which may be given several times."""
    known = next(s for f, s in settings_of(EngineConfig) if f.name == "model")
    parser.add_argument(
        "--model", "-m", action="append", metavar="STR",
        help=f"{known.help} Given several times: one has the device, the others sleep until requests name "
        "them (GPU: weights in host memory). [smollm2-135m]",
    )  # fmt: skip


def engine_configs(args: argparse.Namespace) -> list[EngineConfig]:
    """The settings of each model. Raises UsageError for what is not to be had of several."""
    models: list[str] = args.model or []
    if len(models) < 2:
        return [build(EngineConfig, {**vars(args), "model": models[0] if models else None})]
    configs = [build(EngineConfig, {**vars(args), "model": model}) for model in models]
    if len(set(models)) < len(models):
        raise UsageError("--model: two of them are the same")
    server = build(ServerConfig, vars(args))
    for name in OF_ONE_MODEL:
        given = getattr(args, name) if name == "revision" else getattr(configs[0], name, None)
        if given is not None or (name == "chat_template" and server.chat_template is not None):
            raise UsageError(f"{flag_of(name)} is for one model, and --model is given {len(models)} times")
    return [replace(config, enable_sleep_mode=True) for config in configs]


def rename(configs: Sequence[EngineConfig], server: ServerConfig) -> list[str]:
    """What clients call each model, a line a name: several names are of the one model, or one of each.

    Raises UsageError where there are more or fewer names than models, or a name twice.
    """
    if len(configs) == 1:
        return [server.served_model_name or configs[0].model]
    names = [config.model for config in configs]
    if server.served_model_name is not None:
        names = server.served_model_name.split("\n")
    if len(names) != len(configs) or len(set(names)) < len(names):
        raise UsageError(
            f"--served-model-name: {len(configs)} models have one name each, got {', '.join(names)}"
        )
    return names


def room_for_others(configs: Sequence[EngineConfig]) -> list[EngineConfig]:
    """With GPU memory left free for what the engines that are yet to be loaded keep in their sleep."""
    if len(configs) == 1:
        return list(configs)
    from rvllm.backends.load import choose_device

    if choose_device(configs[0]) == "cpu":
        return list(configs)
    return [
        replace(config, gpu_memory_reserve_gb=config.gpu_memory_reserve_gb + CONTEXT_GB * to_come)
        for to_come, config in zip(range(len(configs) - 1, -1, -1), configs, strict=True)
    ]
