"""What the API process and the engine process say to each other: msgspec Structs over pyzmq."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from rvllm.backends.base import LedgerLine, Limits, SamplingSpec, TokenLogprobs
from rvllm.errors import RvllmError, UsageError
from rvllm.telemetry.stats import Stats, StepKernel


class Sampling(SamplingSpec, frozen=True, array_like=True):
    """The engine's share of SamplingParams: everything that needs token ids only, the backend's among it.

    Text (stop strings, detokenising) and fan-out (`n`) stay in the API process. Among `stop_token_ids` are
    those that end a text, unless ignore_eos.
    """

    max_tokens: int = 16
    prompt_logprobs: int | None = None
    grammar: str | None = None  # in llguidance's form; the output follows it (a Vocabulary must have come)
    allowed_token_ids: tuple[int, ...] = ()  # the only tokens that may be drawn; empty: any
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences that must not be written


class Generate(msgspec.Struct, tag="generate", array_like=True):
    """A new request; `request_id` is unique among those alive."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: Sampling
    priority: int = 0  # lower runs first; batches use a high number
    arrival: float = 0.0  # seconds, time.time() of the API process
    client: str = ""  # whose request it is, where clients get fair shares
    group: str = ""  # choices of one prompt have it in common; "": it stands alone


class Embed(msgspec.Struct, tag="embed", array_like=True):
    """A text to turn into a vector or classes; `request_id` is unique among those alive.

    second: for a pair of texts, the index of the second one's first token. tokens: what comes back is of
    each token, not of the text. It is answered by one Output with `embedding`, or with finish_reason "error"
    or "abort".
    """

    request_id: str
    prompt_token_ids: list[int]
    priority: int = 0
    arrival: float = 0.0  # seconds, time.time() of the API process
    second: int | None = None
    tokens: bool = False


def embedded(request: Embed, numbers: bytes) -> NDArray[np.float32]:
    """An Output's `embedding` as an array: [width], or [tokens, width] where each token's was asked for."""
    found = np.frombuffer(numbers, dtype="<f4")
    return found.reshape(len(request.prompt_token_ids), -1) if request.tokens else found


async def embedding_of(request: Embed, outputs: AsyncGenerator[Output, None]) -> NDArray[np.float32]:
    """What the request's outputs hold; see `embedded`. Closes them.

    Raises UsageError when the text cannot be encoded, RvllmError when it was aborted.
    """
    async with aclosing(outputs):
        async for output in outputs:
            if output.embedding is not None:
                return embedded(request, output.embedding)
            if output.finish_reason == "error":
                raise UsageError(output.error or "the engine gave up on the text")
    raise RvllmError(f"request {request.request_id} was aborted")


class Abort(msgspec.Struct, tag="abort", array_like=True):
    """The client went away or a stop string was found; unknown ids are ignored."""

    request_ids: list[str]


class Vocabulary(msgspec.Struct, tag="vocabulary", array_like=True):
    """What grammars need to know of the tokens; comes before the first request with a grammar.

    tokenizer: the text of a tokenizer.json. eos_token_ids: for models whose config names none.
    """

    tokenizer: str
    eos_token_ids: list[int]


class GetStats(msgspec.Struct, tag="stats", array_like=True):
    """Asks for a Stats message."""


class GetState(msgspec.Struct, tag="state", array_like=True):
    """Asks for a State message of at most so many sequences and so many block ids."""

    sequences: int = 64
    blocks: int = 8192


class Sleep(msgspec.Struct, tag="sleep", array_like=True):
    """Gives memory back; answered by Slept. level: 0 wakes up, 1 gives up KV blocks, 2 weights as well.

    keep_kv: what KV blocks hold is kept in host memory.
    """

    level: int
    keep_kv: bool = False


class Slept(msgspec.Struct, tag="slept", array_like=True):
    """The level of sleep reached, and the seconds it took. refused: why nothing was done."""

    level: int
    seconds: float
    refused: str | None = None


class Shutdown(msgspec.Struct, tag="shutdown", array_like=True):
    """The engine process ends after the step in progress."""


class PrefillChunk(msgspec.Struct, array_like=True, gc=False):
    """A part of a prompt that one step computed; from its launch to its end, time.time()."""

    step: int
    tokens: int
    began: float
    ended: float


class Output(msgspec.Struct, array_like=True, gc=False):
    """New tokens of one request. finish_reason is set exactly once, on its last Output.

    finish_reason: "stop" (stop_reason: the token id), "length", "abort" or "error" (error: why).
    """

    request_id: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None  # for prompt positions 1 ..; sent with the first token
    cached_tokens: int = 0
    finish_reason: str | None = None
    stop_reason: int | None = None
    error: str | None = None
    queue_seconds: float = 0.0  # set on the first Output: time from arrival to first scheduling
    prefill: list[PrefillChunk] | None = None  # set on the first Output: how its prompt was computed
    embedding: bytes | None = None  # an Embed's vector or vectors, little-endian float32
    waited_too_long: bool = False  # an "error" because it waited for --max-queue-seconds


class Outputs(msgspec.Struct, tag="outputs", array_like=True):
    """All that one step produced."""

    outputs: list[Output]


class SequenceState(msgspec.Struct, rename={"request_id": "id"}, gc=False):
    """One request at a moment; counts in tokens, times in seconds."""

    request_id: str
    running: bool  # else it waits
    prompt_tokens: int
    output_tokens: int
    computed: int  # tokens whose keys and values are in the cache
    max_tokens: int  # the most it may generate
    cached_tokens: int
    age: float  # since it arrived
    queued: float  # until its first step, or so far
    blocks: list[int]  # in the order of its tokens; cut short where State.cut says so


class State(msgspec.Struct, tag="state", kw_only=True, array_like=True):
    """What the engine is doing: for people who watch, made only when asked for.

    floor_seconds: the least time a decode step of what runs now can take; None: not known.
    """

    stats: Stats
    sequences: list[SequenceState] = []
    cached_blocks: list[int] = []  # free, with a reusable prefix; released longest ago first
    cut: bool = False  # whether there are more sequences or blocks than listed
    kernels: list[StepKernel] = []  # of the last step, in the order of first use
    floor_seconds: float | None = None


class ModelFacts(msgspec.Struct, kw_only=True):
    """What requests need to know of the loaded model.

    generation_config: sampling defaults under Hugging Face's names; empty when `--generation-config none`.
    max_model_len: longest prompt and output together, in tokens.
    """

    architecture: str
    model_path: str  # directory or .gguf file, where the tokenizer is
    vocab_size: int
    max_model_len: int
    eos_token_ids: list[int] = []
    bos_token_id: int | None = None
    dtype: str = ""
    generation_config: dict[str, Any] = {}
    max_logprobs: int = 20  # most that a request may ask for, for each token; -1: any number
    embedding_size: int | None = None  # numbers that come back for a text; None: the model generates text
    labels: list[str] | None = None  # a classifier's classes; None: what comes back is a vector
    classifies_tokens: bool = False  # it was trained to give classes of tokens, and gives none of texts
    activation: str = "identity"  # softmax, sigmoid or identity makes a classifier's numbers probabilities
    joins_pairs: bool = False  # a pair of texts is one text (decoders), not two with marks between them
    text_prompts: dict[str, str] = {}  # what is put before texts, by name (sentence-transformers' prompts)
    default_prompt: str | None = None  # the one that is put before a text when none is asked for

    def check_generates(self) -> None:
        """Raises UsageError for a model that pools."""
        if self.embedding_size is not None:
            raise UsageError(f"{self.architecture} gives embeddings and generates no text")

    def check_pools(self) -> None:
        """Raises UsageError for a model that generates text."""
        if self.embedding_size is None:
            raise UsageError(f"{self.architecture} generates text and gives no embeddings")

    def check_prompt(self, token_ids: Sequence[int]) -> None:
        """Raises UsageError for a prompt that is empty, too long for an answer or of another vocabulary."""
        self.check_generates()
        if len(token_ids) >= self.max_model_len:
            raise UsageError(self.prompt_too_long(f"{len(token_ids)} tokens"))
        self._check_some(token_ids)

    def check_text(self, token_ids: Sequence[int]) -> None:
        """Raises UsageError for a text to pool that is empty, too long or of another vocabulary."""
        self.check_pools()
        if len(token_ids) > self.max_model_len:
            raise self.text_too_long(f"{len(token_ids)} tokens")
        self._check_some(token_ids)

    def prompt_too_long(self, what: str) -> str:
        """What is said of a prompt of so many tokens or characters that does not fit into the context."""
        return (
            f"the prompt has {what}, but the context holds {self.max_model_len} tokens "
            "and at least one is for the answer"
        )

    def text_too_long(self, what: str) -> UsageError:
        """The refusal of a text to pool of so many tokens or characters."""
        return UsageError(
            f"the text has {what}, but the model takes {self.max_model_len} tokens; "
            "truncate_prompt_tokens=-1 leaves out the rest"
        )

    def _check_some(self, token_ids: Sequence[int]) -> None:
        if not token_ids:
            raise UsageError("prompt must not be empty")
        self.check_tokens("prompt", token_ids)

    def check_tokens(self, name: str, token_ids: Sequence[int]) -> None:
        """Raises UsageError, which names the parameter, where an id is not of the vocabulary."""
        for token in (min(token_ids, default=0), max(token_ids, default=0)):
            if not 0 <= token < self.vocab_size:
                raise UsageError(f"{name}: token id {token} is not in the vocabulary of {self.vocab_size}")


class Loading(msgspec.Struct, tag="loading", array_like=True):
    """Progress of the start: what is being done, and which part of it (0 to 1) is."""

    fraction: float
    text: str


class Ready(msgspec.Struct, tag="ready", kw_only=True, array_like=True):
    """The engine has loaded its model and takes requests."""

    backend: str
    limits: Limits
    load_seconds: float
    ledger: list[LedgerLine]
    facts: ModelFacts
    scheduling_policy: str = "priority"
    sleep_mode: bool = False
    phases: list[tuple[str, float]] = []  # of the load, in order, and the seconds that each took
    fairness: str = "none"  # or whose requests get fair shares: api-key, user


class Failed(msgspec.Struct, tag="failed", array_like=True):
    """The engine could not start or has died; `message` is meant for the user."""

    message: str
    exit_code: int = 1


ToEngine = Generate | Embed | Abort | Vocabulary | GetStats | GetState | Sleep | Shutdown
FromEngine = Outputs | Stats | State | Slept | Loading | Ready | Failed
