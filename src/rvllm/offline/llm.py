"""`rvllm.LLM`: the engine in this process, under vLLM's names, so that scripts written for it run."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rvllm.config import EngineConfig, SourceConfig
from rvllm.engine.core import EngineCore
from rvllm.engine.sampling_params import BeamSearchParams, SamplingParams
from rvllm.errors import UsageError
from rvllm.offline.arguments import engine_config, one_each, prompt_list, refuse
from rvllm.offline.pooling import Pooling
from rvllm.offline.progress import loading_bar, progress_bar
from rvllm.settings import build
from rvllm.text.grammar.grammar import check_tokenizer, vocabulary_of
from rvllm.text.outputs import RequestMetrics, RequestOutput
from rvllm.text.pending import PendingRequest
from rvllm.text.processor import Choice, Delta
from rvllm.text.requests import Prompt, RequestMaker, prompt_tokens
from rvllm.text.tokenizers.tokenizer import Tokenizer
from rvllm.vllm.flags import check_wake_up_tags

if TYPE_CHECKING:
    from rvllm.offline.beam_search import BeamSearchOutput
    from rvllm.offline.llm_engine import LLMEngine
    from rvllm.offline.metrics import Metric

Message = Mapping[str, Any]


class LLM(Pooling):
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

        self._closed = True  # nothing to give back yet
        self.config = engine_config(model, revision, {**settings, "tokenizer": tokenizer})
        source = build(SourceConfig, {})
        with ProgressBar() as fetching:
            path = resolve(self.config.model, source, fetching)
        self.tokenizer: Tokenizer | None = None  # after skip_tokenizer_init
        if not self.config.skip_tokenizer_init:
            words = self.config.tokenizer
            self.tokenizer = Tokenizer.load(path if words is None else resolve(words, source))
        self._load()
        self._requests = RequestMaker(self.engine.facts, self.config.seed, self.tokenizer)
        self._counter = 0
        self._grammars_ready = False

    def _load(self) -> None:
        with loading_bar() as show:
            self.engine = EngineCore.from_config(self.config, show)
        self._closed, self._grammars_ready = False, False

    def close(self) -> None:
        """Gives memory and device back; the object is unusable afterwards."""
        if not self._closed:
            self._closed = True
            self.engine.close()

    def __del__(self) -> None:
        """`del llm` gives memory back too, as scripts expect that load one model after another."""
        if not getattr(self, "_closed", True) and not sys.is_finalizing():
            self.close()

    def sleep(self, level: int = 1) -> None:
        """Gives all memory back until `wake_up`, at whatever level: loading again takes seconds."""
        self.close()

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Loads the model again after `sleep`, all of it. Raises UsageError for `tags` that name a part."""
        check_wake_up_tags(tags or ())
        if self._closed:
            self._load()

    @property
    def llm_engine(self) -> LLMEngine:
        """The engine, to be driven step by step."""
        from rvllm.offline.llm_engine import LLMEngine

        return LLMEngine(self)

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """Forgets cached prefixes; False while requests run, unless these are to be computed again.

        reset_connector changes nothing: there is none.
        """
        if self.engine.has_work() and not reset_running_requests:
            return False
        self.engine.reset_prefix_cache(reset_running_requests)
        return True

    def get_metrics(self) -> list[Metric]:
        from rvllm.offline.metrics import metrics_of

        return metrics_of(self.engine)

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises UsageError after skip_tokenizer_init."""
        if self.tokenizer is None:
            raise UsageError("there is no tokenizer: the model was loaded with skip_tokenizer_init")
        return self.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What `generate` uses when given none: vLLM's defaults and the model's generation_config."""
        return SamplingParams(**self._requests.defaults)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        *,
        lora_request: Any = None,
        priority: Sequence[int] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Completes prompts, all at once, and returns their outputs in order.

        prompts: a text, `{"prompt": text}`, `{"prompt_token_ids": ids}`, or a list of these.
        sampling_params: one for all, one for each, or None for the model's defaults.
        use_tqdm: shows a progress bar. priority: one for each prompt, lower ones run first.
        Raises UsageError naming the prompt or parameter that is wrong; nothing has run then.
        """
        refuse(lora_request=lora_request, tokenization_kwargs=tokenization_kwargs)
        items = prompt_list(prompts)
        params = self._params(sampling_params, len(items))
        texts = [prompt_tokens(item, self.tokenizer) for item in items]
        return self._run(texts, params, bool(use_tqdm), priority)

    def pending(self, prompt: Prompt, params: SamplingParams, priority: int = 0) -> PendingRequest:
        """A request that has not been given to the engine. Raises UsageError naming what is wrong with it."""
        return self._requests_of([prompt_tokens(prompt, self.tokenizer)], [params], [priority])[0]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: Any = None,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation or a list of them, made into prompts by the model's chat template.

        chat_template: a template's source, or the name of one of the model's.
        chat_template_content_format changes nothing: the template itself is asked what it takes.
        Raises UsageError naming what is wrong with messages, template or parameters.
        """
        refuse(lora_request=lora_request, tokenization_kwargs=tokenization_kwargs,
               mm_processor_kwargs=mm_processor_kwargs)  # fmt: skip
        tokenizer = self.get_tokenizer()
        single = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Sequence[Any] = [messages] if single else messages
        params = self._params(sampling_params, len(conversations))
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

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams, **neutral: Any
    ) -> list[BeamSearchOutput]:
        """The best continuations by their whole probability, `beam_width` of them for each prompt."""
        from rvllm.offline.beam_search import beam_search

        refuse(lora_request=neutral.get("lora_request"))
        return [beam_search(self, *prompt_tokens(p, self.tokenizer), params) for p in prompt_list(prompts)]

    def _params(
        self, given: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> list[SamplingParams]:
        return one_each("sampling_params", given, SamplingParams, count, self.get_default_sampling_params)

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
            for request in requests if priority else self._order(requests):
                for message in request.messages:
                    self.engine.add_request(message)
            with progress_bar(len(requests), show) as advance:
                while running:
                    for request, delta in self.step(running):
                        ended = delta.finish_reason is not None and request.finished
                        advance(len(delta.token_ids), ended)
        finally:
            self.engine.abort(list(running))
            while self.engine.has_work():
                self.engine.step()
        return [request.to_output(self.tokenizer) for request in requests]

    def step(self, running: dict[str, PendingRequest]) -> Iterator[tuple[PendingRequest, Delta]]:
        """Computes a step and tells what it brought to requests; choices that end are taken out.

        running: the requests, by the engine's ids of their choices.
        """
        for output in self.engine.step():
            request = running.get(output.request_id)
            if request is None:  # what comes after a stop string
                continue
            delta = request.feed(output)
            if delta.abort_needed:
                self.engine.abort([output.request_id])
            if delta.finish_reason is not None:
                del running[output.request_id]
            yield request, delta

    def _requests_of(
        self,
        prompts: list[tuple[str | None, list[int]]],
        params: list[SamplingParams],
        priority: Sequence[int] | None,
    ) -> list[PendingRequest]:
        if priority is not None and len(priority) != len(prompts):
            raise UsageError(f"priority has {len(priority)} entries for {len(prompts)} prompts")
        requests, now = [], time.time()  # they have come together: what is added first ranks first
        for i, ((text, ids), param) in enumerate(zip(prompts, params, strict=True)):
            name = self._next_name()
            try:
                made = self._requests.make(
                    name, ids, param, priority=priority[i] if priority else 0, arrival=now
                )
            except UsageError as error:
                raise UsageError(f"prompts[{i}]: {error}" if len(prompts) > 1 else str(error)) from None
            if made[0].sampling.grammar is not None:
                self._prepare_grammars()
            choices = {m.request_id: Choice(self.tokenizer, param, ids, k) for k, m in enumerate(made)}
            requests.append(PendingRequest(name, text, ids, param, made, choices, RequestMetrics(now)))
        return requests

    def _order(self, requests: list[PendingRequest]) -> list[PendingRequest]:
        """The order in which requests that came together are begun.

        Those that may get the longest answers come first, so that none of them runs on alone at the end (the
        LPT rule, Graham 1969). `fcfs` keeps the order of the list.
        """
        if self.config.scheduling_policy == "fcfs":
            return requests
        return sorted(requests, key=lambda request: -request.messages[0].sampling.max_tokens)

    def _prepare_grammars(self) -> None:
        """Hands the vocabulary to the engine, with the first request that has a grammar."""
        if not self._grammars_ready:
            check_tokenizer(self.tokenizer)
            self.engine.grammars.set_vocabulary(vocabulary_of(self.get_tokenizer()))
            self._grammars_ready = True
