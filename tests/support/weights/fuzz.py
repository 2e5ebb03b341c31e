"""Fuzzers over a model's files, through everything that reads them before a weight reaches a device.

As in `support/clients/fuzz.py`: valid files, damaged from a seed. A file loads, or is refused with an error
of one line; nothing else may happen, in little time and memory. (tests/weights/test_fuzz.py damages them as
hypothesis likes it.)
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from rvllm.config import EngineConfig
from rvllm.engine.loading import model_facts
from rvllm.errors import RvllmError
from rvllm.models.overrides import read_config
from rvllm.models.registry import build_program
from rvllm.program.dtypes import DType
from rvllm.text.tokenizers.tokenizer import Tokenizer
from rvllm.weights.open import open_checkpoint
from rvllm.weights.packing import check_weights
from support.faults.weights import broken_model
from support.text.tiny_tokenizers import byte_level_metadata
from support.weights.model_files import LLAMA, gguf_bytes, llama_tensors
from support.weights.quantisers import CASES, file_of

SECONDS = 10  # for one case
MEGABYTES = 256  # that one case may add to what was held before
BYTES = [0, 1, 0x7F, 0x80, 0xFF]
WORDS = [0, 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 40, 1 << 32, (1 << 31) - 1]
VALUES = [
    None,
    -1,
    0,
    1,
    7,
    2**31,
    2**63,
    10**30,
    0.0,
    -1.5,
    1e300,
    "",
    "x",
    "1",
    [],
    [1],
    {},
    {"a": 1},
    True,
]


def load(path: Path) -> None:
    """All that a start does with a model's files but for copying its weights and running it."""
    checkpoint = open_checkpoint(path)
    for info in checkpoint.tensors.values():
        assert len(checkpoint.raw(info)) == info.nbytes
    config = EngineConfig(model=str(path))
    model = read_config(checkpoint, config)
    program = build_program(model, DType.F32)
    check_weights(program, checkpoint)
    model_facts(program, checkpoint, model, config, 64)
    Tokenizer.load(path).encode("hello wörld 123")


def tried(path: Path, seen: Counter[str]) -> None:
    """Loads it within limits and counts what came of it."""

    def late(*_: object) -> None:
        raise AssertionError(f"still not loaded after {SECONDS} s")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        load(path)
        seen["loaded"] += 1
    except RvllmError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000, str(error)[:2000]
        seen["refused"] += 1
    finally:
        signal.alarm(0)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    assert grown < MEGABYTES, f"{grown} MB for one file"


def bytes_damaged(rng: random.Random, whole: bytes, header: int) -> bytes:
    """A file with a few bytes of its header changed, cut out, doubled or put in, and perhaps cut short."""
    data = bytearray(whole)
    for _ in range(rng.randint(1, 4)):
        at, kind = rng.randrange(min(header, len(data))), rng.randrange(5)
        if kind == 0:
            data[at] = rng.choice([*BYTES, rng.randrange(256)])
        elif kind == 1:
            data[at : at + 8] = rng.choice(WORDS).to_bytes(8, "little")
        elif kind == 2:
            del data[at : at + rng.randint(1, 40)]
        elif kind == 3:
            data[at:at] = rng.randbytes(rng.randint(1, 40))
        else:
            other = rng.randrange(min(header, len(data)))
            data[at : at + 8] = data[other : other + 8]
    return bytes(data[: rng.randrange(len(data))] if rng.random() < 0.2 else data)


def _kept(path: Path, rng: random.Random, cases: int, make: Callable[[], bytes], root: Path) -> Counter[str]:
    """Writes each case to `path` and loads `root`; the file of a case that fails stays there."""
    seen: Counter[str] = Counter()
    whole = path.read_bytes()
    for _ in range(cases):
        path.write_bytes(make() if rng.random() > 0.02 else whole)  # now and then as it should be
        try:
            tried(root, seen)
        except BaseException:
            print(f"the case is kept in {root}")
            raise
    shutil.rmtree(root.parent if root.is_file() else root)
    return seen


@cache
def _gguf() -> bytes:
    tokenizer = byte_level_metadata()
    count = len(tokenizer["tokenizer.ggml.tokens"])
    tensors = dict(llama_tensors())
    embedding = np.random.default_rng(0).normal(size=(count, 32)).astype(np.float32)
    tensors["token_embd.weight"] = ("F32", (count, 32), embedding.tobytes())
    return gguf_bytes(LLAMA | tokenizer, tensors)


def fuzz_gguf(rng: random.Random, cases: int) -> Counter[str]:
    """GGUF: header, metadata, tokenizer and the table of tensors."""
    path, whole = Path(tempfile.mkdtemp(prefix="hostile-gguf-")) / "m.gguf", _gguf()
    path.write_bytes(whole)
    first = whole.index(b"general.architecture")
    tail = whole.rindex(b"token_embd.weight")

    def make() -> bytes:
        if rng.random() < 0.5:  # the places that matter are few beside thousands of tokens
            return bytes_damaged(rng, whole, first + 500)
        data = bytes_damaged(rng, whole[tail - 800 : tail + 200], 1000)
        return whole[: tail - 800] + data + whole[tail + 200 :]

    return _kept(path, rng, cases, make, path)


def fuzz_safetensors(rng: random.Random, cases: int) -> Counter[str]:
    """Headers of safetensors, plain and of the quantised formats."""
    folder = Path(tempfile.mkdtemp(prefix="hostile-safetensors-")) / "model"
    shutil.copytree(broken_model(), folder)
    path = folder / "model.safetensors"
    whole, config = path.read_bytes(), json.loads((folder / "config.json").read_text())
    numbers = np.random.default_rng(0)
    small = {}
    for name in ("fp8_blocks", "fp8_scalar", "gptq_desc_act", "awq", "packed_asymmetric"):
        matrix = numbers.normal(size=(8, 32)).astype(np.float32)
        small[name] = (CASES[name][0], file_of(CASES[name][1]("a", matrix, numbers)[0]))

    def make() -> bytes:
        kind, data = None, whole
        if rng.random() < 0.5:
            kind, data = small[rng.choice(list(small))]
        (folder / "config.json").write_text(
            json.dumps(config | ({"quantization_config": kind} if kind else {}))
        )
        return bytes_damaged(rng, data, 8 + int.from_bytes(data[:8], "little"))

    return _kept(path, rng, cases, make, folder)


def fuzz_configs(rng: random.Random, cases: int) -> Counter[str]:
    """config.json and generation_config.json with values that nobody expects."""
    folder = Path(tempfile.mkdtemp(prefix="hostile-config-")) / "model"
    shutil.copytree(broken_model(), folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64}, "tie_word_embeddings": False,
               "hidden_act": "silu", "sliding_window": None, "attention_bias": False}  # fmt: skip

    def make() -> bytes:
        (folder / "generation_config.json").write_text(json.dumps(changed(rng, {"eos_token_id": [1, 2]}, 1)))
        return json.dumps(changed(rng, config, rng.randint(1, 3))).encode()

    return _kept(folder / "config.json", rng, cases, make, folder)


def changed(rng: random.Random, config: dict[str, Any], count: int) -> dict[str, Any]:
    """A config with some fields changed, left out or put in."""
    made: dict[str, Any] = json.loads(json.dumps(config))
    for _ in range(count):
        at = (
            made["rope_scaling"]
            if isinstance(made.get("rope_scaling"), dict) and rng.random() < 0.3
            else made
        )
        key = rng.choice([*at, "quantization_config", "num_local_experts"])
        if rng.random() < 0.2:
            at.pop(key, None)
        else:
            at[key] = json.loads(json.dumps(rng.choice(VALUES)))
    return made


KINDS = {"gguf": fuzz_gguf, "safetensors": fuzz_safetensors, "configs": fuzz_configs}
