"""A server over a double of the engine's client: real HTTP, real tokenizer, scripted tokens."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rvllm.api.app import build_app
from rvllm.api.generate.generation import Service
from rvllm.api.http.exchange import Gate
from rvllm.api.http.listen import StopSignals, bind
from rvllm.api.http.server import serve
from rvllm.backends.base import Limits, TokenLogprobs
from rvllm.config import ServerConfig
from rvllm.engine.ipc.messages import (
    Embed,
    Generate,
    ModelFacts,
    Output,
    PrefillChunk,
    Ready,
    SequenceState,
    State,
    Vocabulary,
)
from rvllm.errors import EngineDeadError
from rvllm.telemetry.metrics import Metrics
from rvllm.telemetry.stats import Stats, StepKernel
from rvllm.text.requests import RequestMaker
from support.text.tiny_tokenizers import byte_level

ANSWER = "Grüße from 日本 😀 and hello world, the quick brown fox."
CONTEXT = 256


class FakeEngine:
    """Answers every request with ANSWER over and over, one token an output, as fast as `pace` allows."""

    def __init__(self, answer: list[int]) -> None:
        self.usual_answer = answer
        self.behave()
        self.asked_for_state = 0
        self.requests: list[Generate] = []
        self.open: set[str] = set()
        self.aborted: list[str] = []
        self.vocabularies: list[Vocabulary] = []
        self.embedding_size = 0
        self.embeds: list[Embed] = []
        self.sleep_level = 0
        self.dead = asyncio.Event()
        self.cause = ""

    def behave(self) -> None:
        """As it is before a test asks for something else."""
        self.answer = self.usual_answer
        self.pace = 0.0  # seconds between tokens
        self.held = False  # no token comes while this is set
        self.error: str | None = None  # end every request with this
        self.chunks = 0  # steps that a prompt takes
        self.cached = [4]  # prompt tokens that the cache holds, for each choice in turn
        self.queue_seconds = 0.0  # that a request waits before its first token
        self.length = 1.0  # of vectors

    @property
    def alive(self) -> bool:
        return not self.dead.is_set()

    @property
    def status(self) -> str:
        return "ready" if self.alive else "failed"

    async def sleep(self, level: int, keep_kv: bool = False) -> float:
        self.sleep_level, self.held, self.keeps = level, level > 0, keep_kv
        return 0.5

    async def restart(self) -> None:
        self.dead = asyncio.Event()

    def kill(self) -> None:
        self.die("killed")

    async def wait_dead(self) -> str:
        await self.dead.wait()
        return self.cause

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        self.vocabularies.append(vocabulary)

    async def stats(self) -> Stats:
        return Stats(
            running=len(self.open), blocks_total=10, blocks_used=len(self.open), steps=7, floor_ratio=0.9
        )

    async def state(self) -> State:
        self.asked_for_state += 1
        if not self.alive:
            raise EngineDeadError(self.cause)
        sequences = [
            SequenceState(name, True, 20, 5, 24, 64, 16, 1.5, 0.25, [0, i + 1])
            for i, name in enumerate(sorted(self.open))
        ]
        kernels = [StepKernel("qkv", "gemm_bf16", 30, "the only one"), StepKernel("lm_head", "gemm_bf16", 1)]
        return State(
            stats=await self.stats(),
            sequences=sequences,
            cached_blocks=[7, 8],
            kernels=kernels,
            floor_seconds=0.004 if sequences else None,
        )

    def die(self, cause: str) -> None:
        self.cause = cause
        self.dead.set()

    async def generate(self, request: Generate) -> AsyncGenerator[Output, None]:
        if not self.alive:
            raise EngineDeadError(self.cause)
        self.requests.append(request)
        self.open.add(request.request_id)
        finished = False
        try:
            for output in self._outputs(request):
                while self.held and self.alive:
                    await asyncio.sleep(0.005)
                await asyncio.sleep(self.pace)
                if not self.alive:
                    raise EngineDeadError(self.cause)
                finished = output.finish_reason is not None
                yield output
                if finished:
                    return
        finally:
            self.open.discard(request.request_id)
            if not finished:
                self.aborted.append(request.request_id)

    async def embed(self, request: Embed) -> NDArray[np.float32]:
        """A vector of length `self.length` whose direction the tokens alone decide, or one of each token."""
        self.embeds.append(request)
        await asyncio.sleep(self.pace)
        if request.tokens:
            ids = np.array(request.prompt_token_ids)
            rows = np.zeros((len(ids), self.embedding_size), np.float32)
            rows[np.arange(len(ids)), ids % self.embedding_size] = 1 + ids / 1000
            return rows
        vector = np.zeros(self.embedding_size, np.float32)
        for token in request.prompt_token_ids:
            vector[token % len(vector)] += 1 + token / 1000
        return vector * np.float32(self.length) / np.linalg.norm(vector)

    def _outputs(self, request: Generate) -> list[Output]:
        if self.error:
            return [Output(request.request_id, [], finish_reason="error", error=self.error)]
        sampling, outputs = request.sampling, []
        cached = self.cached[int(request.request_id.rpartition("-")[2]) % len(self.cached)]
        for i in range(sampling.max_tokens):
            token = self.answer[i % len(self.answer)]
            output = Output(request.request_id, [token], cached_tokens=cached)
            output.queue_seconds = 0.0 if i else self.queue_seconds
            if sampling.logprobs is not None:
                output.logprobs = [_logprobs(token, sampling.logprobs)]
            if i == 0 and sampling.prompt_logprobs is not None:
                prompt = request.prompt_token_ids[1:]
                output.prompt_logprobs = [_logprobs(t, sampling.prompt_logprobs) for t in prompt]
            if i == 0 and self.chunks:
                now = time.time()
                output.prefill = [PrefillChunk(k, 8, now, now + 0.01) for k in range(self.chunks)]
            if token in sampling.stop_token_ids and i + 1 > sampling.min_tokens:
                output.finish_reason, output.stop_reason = "stop", token
            elif i + 1 == sampling.max_tokens:
                output.finish_reason = "length"
            outputs.append(output)
        return outputs


def _logprobs(token: int, top: int) -> TokenLogprobs:
    others = [(token + i) % 500 for i in range(top)]
    return TokenLogprobs(token, -0.5, 1, others, [-0.5 - i for i in range(top)])


class LiveServer:
    """The HTTP side in a thread of its own, on a free port of 127.0.0.1; use it in a `with` block."""

    def __init__(
        self,
        *,
        texts: bool = True,
        template: str | None = None,
        embedding_size: int | None = None,
        labels: list[str] | None = None,
        **settings: Any,
    ) -> None:
        """texts: whether the server has a tokenizer; template: a chat template instead of its own.

        embedding_size: the model is an encoder with vectors of this size. labels: of so many classes.
        """
        self.labels = labels
        self.embedding_size = embedding_size
        self.config = ServerConfig(port=0, **{"tool_call_parser": "hermes", "allowed_hosts": "*", **settings})
        self.texts, self.template = texts, template
        self.tokenizer = byte_level()
        self.code: int | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.loop: asyncio.AbstractEventLoop
        self.engine: FakeEngine
        self.gate: Gate
        self.service: Service
        self.stop: StopSignals

    def _run(self) -> None:
        self.code = asyncio.run(self._serve())

    async def _serve(self) -> int:
        self.loop, self.stop = asyncio.get_running_loop(), StopSignals()
        self.engine = FakeEngine(self.tokenizer.encode(ANSWER))
        self.engine.embedding_size = self.embedding_size or 0
        facts = ModelFacts(
            embedding_size=self.embedding_size,
            labels=self.labels,
            activation="sigmoid" if self.labels and len(self.labels) == 1 else "softmax",
            architecture="Double",
            model_path="/nowhere",
            vocab_size=self.tokenizer.vocab_size,
            max_model_len=CONTEXT,
            eos_token_ids=[self.tokenizer.eos_token_id or 0],
        )
        ready = Ready(
            backend="double",
            limits=Limits(
                max_num_seqs=4,
                max_num_batched_tokens=64,
                max_model_len=CONTEXT,
                block_size=16,
                num_blocks=10,
                pipeline_depth=1,
            ),
            load_seconds=0.0,
            ledger=[],
            facts=facts,
        )
        metrics = Metrics("tiny", {"block_size": "16"})
        self.service = service = Service(
            self.engine,
            ready,
            self.tokenizer if self.texts else None,
            self.config,
            metrics,
            served_name="tiny",
            requests=RequestMaker(facts, 0, self.tokenizer if self.texts else None),
            chat_template=self.template,
        )
        self.gate = gate = Gate(self.config, metrics)
        sock = bind(self.config)
        self.port = sock.getsockname()[1]
        return await serve(build_app(service, gate), gate, sock, self.engine, self.stop, self._ready.set)

    def __enter__(self) -> LiveServer:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self.call(self.stop.first.set)
        self.call(self.stop.second.set)
        self.ended(10)

    def call(self, what: Callable[..., Any], *args: Any) -> None:
        """Runs something in the server's event loop."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(what, *args)

    def ended(self, seconds: float) -> int | None:
        """The exit code, once the server has ended."""
        self._thread.join(seconds)
        return self.code

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def raw(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """One request; (status, headers, body)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            given = {"Content-Type": "application/json"} if body is not None else {}
            connection.request(method, path, body, given | (headers or {}))
            response = connection.getresponse()
            return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
        finally:
            connection.close()

    def post(self, path: str, **body: Any) -> tuple[int, Any]:
        """A JSON request; (status, parsed answer)."""
        status, _, answer = self.raw("POST", path, json.dumps(body).encode())
        return status, json.loads(answer)

    def last_prompt(self) -> str:
        """The text of the last request's prompt, special tokens included."""
        return self.tokenizer.decode(self.engine.requests[-1].prompt_token_ids, skip_special_tokens=False)

    def chat(self, **body: Any) -> tuple[int, Any]:
        """A chat request with a short conversation, unless `messages` is given."""
        return self.post(
            "/v1/chat/completions", **{"messages": [{"role": "user", "content": "hello"}], **body}
        )

    def events(self, path: str, **body: Any) -> list[Any]:
        """The events of a stream; `[DONE]` must come last and is left out."""
        status, headers, answer = self.raw("POST", path, json.dumps({**body, "stream": True}).encode())
        assert status == 200, answer
        assert headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.decode().split("\n\n") if line]
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
