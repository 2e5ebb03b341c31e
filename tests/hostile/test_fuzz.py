"""A short run of each fuzzer; `python scripts/fuzz.py KIND --cases 10000` runs longer."""

from __future__ import annotations

import random

import pytest

from support.clients import fuzz as clients
from support.weights import fuzz as files

CASES = {
    "http": 400, "schemas": 400, "templates": 200, "multipart": 3000, "tokenizers": 150,
    "gguf": 400, "safetensors": 150, "configs": 200,
}  # fmt: skip
KINDS = clients.KINDS | files.KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_fuzz(kind: str) -> None:
    seen = KINDS[kind](random.Random(1), CASES[kind])
    assert seen.total() >= CASES[kind]
    assert len(seen) >= 2, "some cases are good, some are refused"
