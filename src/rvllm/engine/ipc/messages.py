"""What the API process and the engine process say to each other: msgspec Structs over pyzmq."""

from __future__ import annotations

from typing import Any

import msgspec


class Sampling(msgspec.Struct, frozen=True, array_like=True):
    """The engine's share of SamplingParams: everything that needs token ids only.

    Text (stop strings, detokenising) and fan-out (`n`) stay in the API process.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop_token_ids: tuple[int, ...] = ()  # EOS ids included unless ignore_eos
    min_tokens: int = 0
    max_tokens: int = 16
    logprobs: int | None = None
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

    second: for a pair of texts, the index of the second one's first token. It is answered by one Output
    with `embedding`, or with finish_reason "error" or "abort".
    """

    request_id: str
    prompt_token_ids: list[int]
    priority: int = 0
    arrival: float = 0.0  # seconds, time.time() of the API process
    second: int | None = None


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
    """Gives memory back; answered by Slept. level: 0 wakes up, 1 gives up KV blocks, 2 weights as well."""

    level: int


class Slept(msgspec.Struct, tag="slept", array_like=True):
    """The level of sleep reached, and the seconds it took."""

    level: int
    seconds: float


class Shutdown(msgspec.Struct, tag="shutdown", array_like=True):
    """The engine process ends after the step in progress."""


class TokenLogprobs(msgspec.Struct, array_like=True, gc=False):
    """Log-probabilities of one position: the token's own, its rank (1 is best), the top ones in order."""

    token_id: int
    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]


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
    embedding: bytes | None = None  # an Embed's vector, little-endian float32
    waited_too_long: bool = False  # an "error" because it waited for --max-queue-seconds


class Outputs(msgspec.Struct, tag="outputs", array_like=True):
    """All that one step produced."""

    outputs: list[Output]


class KernelUse(msgspec.Struct, array_like=True, gc=False):
    """Launches of one kernel in a step, for ops alike but for their layer; why: how it was chosen."""

    op: str
    kernel: str
    count: int
    why: str = ""


class Stats(msgspec.Struct, tag="stats", kw_only=True, array_like=True):
    """A snapshot for metrics and the live page."""

    running: int = 0
    waiting: int = 0
    blocks_total: int = 0
    blocks_used: int = 0
    blocks_cached: int = 0  # free to take, but holding a reusable prefix
    steps: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    cached_prompt_tokens: int = 0
    prefix_queries: int = 0  # prompt tokens looked up in the prefix cache
    preemptions: int = 0
    finished: dict[str, int] = {}  # requests ended, by finish reason
    loop_seconds: float = 0.0  # since the engine became ready
    idle_seconds: float = 0.0  # of these, waiting for a request
    host_seconds: float = 0.0  # of these, scheduling and bookkeeping
    masks: int = 0  # token masks computed for grammars
    mask_seconds: float = 0.0  # in all
    mask_exposed_seconds: float = 0.0  # that the device waited for masks
    step_tokens: int = 0  # computed by all steps
    step_counts: list[int] = []  # steps by their number of tokens, see telemetry.bounds
    kernels: list[KernelUse] = []  # of the last step, in the order of first use; only when asked for
    floor_ratio: float | None = None  # floor of the last decode steps over what they took; None: unknown
    mask_p50_seconds: float = 0.0  # how long a token waited for its mask, among the last few thousand
    mask_p99_seconds: float = 0.0
    backend: dict[str, float] = {}
    broken_logits: int = 0  # draws from logits that are infinite or no numbers; each ended its request
    cpu_blocks_total: int = 0  # KV blocks in host memory
    cpu_blocks_used: int = 0  # of these, holding a prefix
    host_hits: int = 0  # of cached_prompt_tokens, those whose blocks came from host memory
    sleep_level: int = 0  # 0: awake
    swaps: int = 0  # of preemptions, those whose blocks may move to host memory
    blocks_moved_out: int = 0
    blocks_moved_in: int = 0


class SequenceState(msgspec.Struct, array_like=True, gc=False):
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
    kernels: list[KernelUse] = []  # of the last step, in the order of first use
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
    activation: str = "identity"  # softmax, sigmoid or identity makes a classifier's numbers probabilities
    joins_pairs: bool = False  # a pair of texts is one text (decoders), not two with marks between them
    text_prompts: dict[str, str] = {}  # what is put before texts, by name (sentence-transformers' prompts)
    default_prompt: str | None = None  # the one that is put before a text when none is asked for


class Loading(msgspec.Struct, tag="loading", array_like=True):
    """Progress of the start: what is being done, and which part of it (0 to 1) is."""

    fraction: float
    text: str


class Ready(msgspec.Struct, tag="ready", kw_only=True, array_like=True):
    """The engine has loaded its model and takes requests."""

    backend: str
    max_model_len: int
    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    load_seconds: float
    ledger: list[tuple[str, int]]
    facts: ModelFacts
    pipeline_depth: int = 1
    scheduling_policy: str = "priority"
    sleep_mode: bool = False
    fairness: str = "none"  # or whose requests get fair shares: api-key, user


class Failed(msgspec.Struct, tag="failed", array_like=True):
    """The engine could not start or has died; `message` is meant for the user."""

    message: str
    exit_code: int = 1


ToEngine = Generate | Embed | Abort | Vocabulary | GetStats | GetState | Sleep | Shutdown
FromEngine = Outputs | Stats | State | Slept | Loading | Ready | Failed
