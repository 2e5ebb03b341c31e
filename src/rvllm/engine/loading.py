"""From settings to a loaded backend: find the model, read it, build its program, give it memory."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rvllm.engine.ipc.messages import ModelFacts
from rvllm.models.config import ModelConfig, token_ids
from rvllm.models.pooling import activation_of, labels_of
from rvllm.program.ops.encoder import classifier, embedding_size

if TYPE_CHECKING:
    from rvllm.backends.base import Encoder, Generator, Progress
    from rvllm.config import EngineConfig
    from rvllm.program.ops.dense import Program
    from rvllm.weights.checkpoint import Checkpoint


class Phases:
    """The parts of a start and how long each took, by what is reported of them.

    A part begins with the first report of its name, which ends at a comma, and ends with the next one's.
    """

    def __init__(self, tell: Progress | None = None, first: str = "imports") -> None:
        self._tell = tell
        self._began, self._name = time.perf_counter(), first
        self._seconds: dict[str, float] = {}

    def report(self, fraction: float, text: str) -> None:
        """A `Progress`, which hands on to the one it was made with."""
        self._begin(text.partition(",")[0])
        if self._tell is not None:
            self._tell(fraction, text)

    def ended(self) -> list[tuple[str, float]]:
        """Names and seconds, in order; nothing is to be reported any more."""
        self._begin("")
        return list(self._seconds.items())

    def _begin(self, name: str) -> None:
        if name != self._name:
            now = time.perf_counter()
            self._seconds[self._name] = self._seconds.get(self._name, 0.0) + now - self._began
            self._began, self._name = now, name


def load(config: EngineConfig, progress: Progress | None = None) -> tuple[Generator | Encoder, ModelFacts]:
    """The configured model on its backend. Raises the RvllmError of whatever is missing or wrong."""
    from rvllm.backends.load import choose_dtype, load_backend
    from rvllm.models.kv_cache import with_kv_cache
    from rvllm.models.overrides import read_config
    from rvllm.models.registry import build_program
    from rvllm.weights.fetch.source import resolve
    from rvllm.weights.open import open_checkpoint
    from rvllm.weights.packing import check_weights

    report = progress or (lambda fraction, text: None)
    report(0.0, "reading the checkpoint")

    def fetching(text: str, done: int, total: int) -> None:
        report(done / total if total else 0.0, text)

    checkpoint = open_checkpoint(resolve(config.model, progress=fetching))
    model = read_config(checkpoint, config)
    program = with_kv_cache(build_program(model, choose_dtype(config, checkpoint)), config.kv_cache_dtype)
    if config.load_format != "dummy":
        check_weights(program, checkpoint)
        if config.check_weights:
            from rvllm.weights.finite import check_finite

            check_finite(checkpoint)
    report(0.0, "planning")
    backend = load_backend(program, checkpoint, config, report)
    return backend, model_facts(program, checkpoint, model, config, backend.limits.max_model_len)


def model_facts(
    program: Program, checkpoint: Checkpoint, model: ModelConfig, config: EngineConfig, max_model_len: int
) -> ModelFacts:
    """What requests need to know of the model.

    End-of-sequence ids of generation_config come first and those of the config after them: chat models
    often name their end of turn in one and their end of text in the other.
    """
    generation = ModelConfig(checkpoint.generation_config, f"{checkpoint.config_origin}: generation_config")
    eos = (*token_ids(generation, "eos_token_id"), *model.eos_token_ids)
    bos = token_ids(model, "bos_token_id")
    head = classifier(program)
    classes = head is not None
    sentence = model.section("sentence_transformers")
    prompts = None if sentence is None else sentence.section("prompts")
    return ModelFacts(
        architecture=program.architecture,
        embedding_size=embedding_size(program),
        labels=list(labels_of(model)) if classes else None,
        classifies_tokens=head is not None and head.tokens,
        activation=activation_of(model) if classes else "identity",
        joins_pairs=bool(program.caches),
        text_prompts={} if prompts is None else {str(k): str(v) for k, v in prompts.values.items()},
        default_prompt=None if sentence is None else sentence.opt_str("default_prompt_name"),
        model_path=str(checkpoint.path),
        vocab_size=program.vocab_size,
        max_model_len=max_model_len,
        eos_token_ids=list(dict.fromkeys(eos)),
        bos_token_id=bos[0] if bos else None,
        dtype=program.dtype.value,
        max_logprobs=config.max_logprobs,
        generation_config={} if config.generation_config == "none" else _plain(checkpoint.generation_config),
    )


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that are numbers, texts, switches or lists of these: all that a message can carry."""
    simple = (bool, int, float, str)
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, simple)
        or (isinstance(value, list) and all(isinstance(entry, simple) for entry in value))
    }
