"""`rvllm.LLM`: the engine in this process, under vLLM's names, so that scripts written for it run."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rvllm.config import EngineConfig, SourceConfig, build
from rvllm.engine.core import EngineCore
from rvllm.engine.ipc.messages import Embed
from rvllm.engine.sampling_params import SamplingParams
from rvllm.errors import RvllmError, UsageError
from rvllm.text.embedding import (
    EmbeddingOutput,
    EmbeddingRequestOutput,
    PoolingParams,
    shorten,
    text_tokens,
)
from rvllm.text.grammar.grammar import check_tokenizer, vocabulary_of
from rvllm.text.outputs import RequestMetrics, RequestOutput
from rvllm.text.pending import PendingRequest
from rvllm.text.processor import Choice
from rvllm.text.requests import Prompt, RequestMaker, prompt_tokens
from rvllm.text.tokenizers.tokenizer import Tokenizer
from rvllm.vllm_flags import VLLM_FLAGS, VLLM_VALUES, settle

Message = Mapping[str, Any]


class LLM:
    """A loaded model that generates text in this process.

    model: a directory, a .gguf file, org/name[@revision][:file.gguf] or the alias smollm2-135m.
    tokenizer: another model to take the tokenizer from. revision: as in org/name@revision.
    settings: EngineConfig's fields (dtype, device, seed, max_model_len, max_num_seqs, ...), and those
    arguments of vLLM that ask for what is done anyway (tensor_parallel_size=1, enforce_eager, ...).

    Raises UsageError for a setting that is unknown or out of range, ModelError for a model that cannot be
    loaded, CapacityError when it does not fit.
    """

    def __init__(
        self,
        model: str = EngineConfig.model,
        *,
        tokenizer: str | None = None,
        revision: str | None = None,
        **settings: Any,
    ) -> None:
        from rvllm.weights.fetch.progress import ProgressBar
        from rvllm.weights.fetch.source import resolve

        self.config = engine_config(model, revision, settings)
        source = build(SourceConfig, {})
        with ProgressBar() as fetching:
            path = resolve(self.config.model, source, fetching)
        self._tokenizer: Tokenizer | None = None
        if not self.config.skip_tokenizer_init:
            self._tokenizer = Tokenizer.load(path if tokenizer is None else resolve(tokenizer, source))
        with loading_bar() as loading:
            self.engine = EngineCore.from_config(self.config, loading)
        self._requests = RequestMaker(self.engine.facts, self.config.seed, self._tokenizer)
        self._counter = 0
        self._grammars_ready = False

    def close(self) -> None:
        """Gives memory and device back; the object is unusable afterwards."""
        self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises UsageError after skip_tokenizer_init."""
        if self._tokenizer is None:
            raise UsageError("there is no tokenizer: the model was loaded with skip_tokenizer_init")
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What `generate` uses when given none: vLLM's defaults and the model's generation_config."""
        return SamplingParams(**self._requests.defaults)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        *,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Completes prompts, all at once, and returns their outputs in order.

        prompts: a text, `{"prompt": text}`, `{"prompt_token_ids": ids}`, or a list of these.
        sampling_params: one for all, one for each, or None for the model's defaults.
        use_tqdm: shows a progress bar. priority: one for each prompt, lower ones run first.
        Raises UsageError naming the prompt or parameter that is wrong; nothing has run then.
        """
        items = _prompt_list(prompts)
        params = _params_list(sampling_params, len(items), self.get_default_sampling_params)
        texts = [prompt_tokens(item, self._tokenizer) for item in items]
        return self._run(texts, params, bool(use_tqdm), priority)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation or a list of them, made into prompts by the model's chat template.

        chat_template: a template's source, or the name of one of the model's.
        Raises UsageError naming what is wrong with messages, template or parameters.
        """
        tokenizer = self.get_tokenizer()
        single = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Sequence[Any] = [messages] if single else messages
        params = _params_list(sampling_params, len(conversations), self.get_default_sampling_params)
        texts: list[tuple[str | None, list[int]]] = []
        for conversation in conversations:
            text = tokenizer.apply_chat_template(
                conversation,
                tools=tools,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=False,
                **(chat_template_kwargs or {}),
            )
            assert isinstance(text, str)
            texts.append((text, tokenizer.encode(text, add_special_tokens=False)))
        return self._run(texts, params, bool(use_tqdm), None)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """Turns texts into vectors with a sentence encoder, in order.

        prompts: as in `generate`. truncate_prompt_tokens: the most tokens of a text to keep, -1 for as many
        as the model takes; None refuses longer texts. pooling_params: one for all, or one for each.
        Raises UsageError naming the text or parameter that is wrong; nothing has run then.
        """
        items = _prompt_list(prompts)
        wanted = _pooling_list(pooling_params, len(items))
        facts = self.engine.facts
        found: dict[str, tuple[str | None, list[int], PoolingParams]] = {}
        for i, (item, params) in enumerate(zip(items, wanted, strict=True)):
            try:
                text, ids = text_tokens(item, self._tokenizer, facts, truncate_prompt_tokens)
                shorten(np.zeros(facts.embedding_size or 0, np.float32), params.dimensions)
            except UsageError as error:
                raise UsageError(f"prompts[{i}]: {error}" if len(items) > 1 else str(error)) from None
            found[str(self._counter)] = text, ids, params
            self._counter += 1
        vectors = self._embed({name: ids for name, (_, ids, _) in found.items()}, bool(use_tqdm))
        return [
            EmbeddingRequestOutput(
                name, EmbeddingOutput(shorten(vectors[name], params.dimensions).tolist()), ids, prompt=text
            )
            for name, (text, ids, params) in found.items()
        ]

    def _embed(self, texts: Mapping[str, list[int]], show: bool) -> dict[str, NDArray[np.float32]]:
        """The vector of each text, by the name it is given under."""
        vectors: dict[str, NDArray[np.float32]] = {}
        try:
            for name, ids in texts.items():
                self.engine.add_embed(Embed(name, ids))
            with progress_bar(len(texts), show) as advance:
                while len(vectors) < len(texts):
                    for output in self.engine.step():
                        if output.embedding is None:
                            raise RvllmError(f"request {output.request_id}: {output.error}")
                        vectors[output.request_id] = np.frombuffer(output.embedding, dtype="<f4")
                        advance(len(texts[output.request_id]), True)
        finally:
            self.engine.abort([name for name in texts if name not in vectors])
            while self.engine.has_work():
                self.engine.step()
        return vectors

    def _run(
        self,
        prompts: list[tuple[str | None, list[int]]],
        params: list[SamplingParams],
        show: bool,
        priority: Sequence[int] | None,
    ) -> list[RequestOutput]:
        """Runs requests to their end. Whatever interrupts it leaves no request behind in the engine."""
        requests = self._requests_of(prompts, params, priority)
        running = {name: request for request in requests for name in request.choices}
        try:
            for request in requests:
                for message in request.messages:
                    self.engine.add_request(message)
            with progress_bar(len(requests), show) as advance:
                while running:
                    for output in self.engine.step():
                        if output.request_id not in running:  # what comes after a stop string
                            continue
                        request = running[output.request_id]
                        delta = request.feed(output)
                        if delta.abort_needed:
                            self.engine.abort([output.request_id])
                        if delta.finish_reason is not None:
                            del running[output.request_id]
                        advance(len(delta.token_ids), request.finished)
        finally:
            self.engine.abort(list(running))
            while self.engine.has_work():
                self.engine.step()
        return [request.to_output(self._tokenizer) for request in requests]

    def _requests_of(
        self,
        prompts: list[tuple[str | None, list[int]]],
        params: list[SamplingParams],
        priority: Sequence[int] | None,
    ) -> list[PendingRequest]:
        if priority is not None and len(priority) != len(prompts):
            raise UsageError(f"priority has {len(priority)} entries for {len(prompts)} prompts")
        requests = []
        for i, ((text, ids), param) in enumerate(zip(prompts, params, strict=True)):
            name = str(self._counter)
            self._counter += 1
            try:
                made = self._requests.make(name, ids, param, priority=priority[i] if priority else 0)
            except UsageError as error:
                raise UsageError(f"prompts[{i}]: {error}" if len(prompts) > 1 else str(error)) from None
            if made[0].sampling.grammar is not None:
                self._prepare_grammars()
            choices = {m.request_id: Choice(self._tokenizer, param, ids, k) for k, m in enumerate(made)}
            requests.append(
                PendingRequest(name, text, ids, param, made, choices, RequestMetrics(time.time()))
            )
        return requests

    def _prepare_grammars(self) -> None:
        """Hands the vocabulary to the engine, with the first request that has a grammar."""
        if not self._grammars_ready:
            check_tokenizer(self._tokenizer)
            self.engine.set_vocabulary(vocabulary_of(self.get_tokenizer()))
            self._grammars_ready = True


def engine_config(model: str, revision: str | None, settings: Mapping[str, Any]) -> EngineConfig:
    """EngineConfig of LLM's arguments, ours and vLLM's (`vllm_flags.py`).

    Raises UsageError naming one that is unknown or asks for what is not done, with what to use instead.
    """
    known = set(EngineConfig.__dataclass_fields__)
    given: dict[str, Any] = {}
    for name, value in settings.items():
        if name in known:
            translated = VLLM_VALUES.get(name, {})
            given[name] = translated.get(value, value) if isinstance(value, str | int | None) else value
        elif name not in VLLM_FLAGS:
            raise UsageError(f"LLM: unknown argument {name!r}; known are {', '.join(sorted(known))}")
        elif (found := settle(name, value, f"LLM: {name}=")) is not None and found[0] in known:
            given[found[0]] = found[1]
    return build(EngineConfig, {**given, "model": model, "revision": revision})


def _prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts, of one prompt or of many; a flat list of whole numbers is one prompt."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    items: list[Any] = list(prompts)
    return [items] if items and isinstance(items[0], int) else items


def _params_list(
    params: SamplingParams | Sequence[SamplingParams] | None,
    count: int,
    default: Callable[[], SamplingParams],
) -> list[SamplingParams]:
    if params is None:
        params = default()
    if isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise UsageError(f"sampling_params has {len(params)} entries for {count} prompts")
    return list(params)


def _pooling_list(params: PoolingParams | Sequence[PoolingParams] | None, count: int) -> list[PoolingParams]:
    if params is None or isinstance(params, PoolingParams):
        return [params or PoolingParams()] * count
    if len(params) != count:
        raise UsageError(f"pooling_params has {len(params)} entries for {count} prompts")
    return list(params)


@contextmanager
def loading_bar() -> Iterator[Callable[[float, str], None]]:
    """A bar for the model's loading on a terminal; yields `report(fraction, what is being done)`."""
    if not sys.stderr.isatty():
        yield lambda fraction, text: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("loading", total=1.0)
        yield lambda fraction, text: bar.update(task, completed=fraction, description=text)


@contextmanager
def progress_bar(total: int, show: bool) -> Iterator[Callable[[int, bool], None]]:
    """A bar over requests with the rate of output tokens; yields `advance(new tokens, request done)`."""
    if not show or not sys.stderr.isatty():
        yield lambda tokens, done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[rate]}"), console=Console(stderr=True)) as bar:
        task = bar.add_task("prompts", total=total, rate="")
        started, tokens_out = time.perf_counter(), 0

        def advance(tokens: int, done: bool) -> None:
            nonlocal tokens_out
            tokens_out += tokens
            rate = tokens_out / max(time.perf_counter() - started, 1e-9)
            bar.update(task, advance=int(done), rate=f"{rate:,.0f} tok/s")

        yield advance
