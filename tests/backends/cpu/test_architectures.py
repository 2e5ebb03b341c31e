"""Tiny models against Transformers: from golden files, and live with the extra `oracle`."""

import sys
from pathlib import Path

import numpy as np
import pytest

from support.models import tiny

ROOT = Path(__file__).parents[3]
ROWS = slice(3, None, 4)  # as in scripts/make_golden_tiny.py


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(ROOT / "tests" / "golden" / "tiny.npz") as file:
        return dict(file)


@pytest.mark.parametrize("name", tiny.CASES)
def test_logits_equal_golden(name: str, golden: dict[str, np.ndarray]) -> None:
    config = tiny.CASES[name]
    ours = tiny.logits_of(tiny.load(config), tiny.prompt_of(config))[ROWS]
    np.testing.assert_allclose(ours, golden[f"{name}/logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", tiny.CASES)
def test_greedy_tokens_equal_golden(name: str, golden: dict[str, np.ndarray]) -> None:
    config = tiny.CASES[name]
    expected = golden[f"{name}/greedy"]
    length = None
    if name == "llama_longrope":  # Transformers changes factors at position 32, we by the longest context
        length, expected = 32, expected[:24]
    drawn = tiny.generate(tiny.load(config, max_model_len=length), tiny.prompt_of(config)[:8], len(expected))
    assert drawn == expected.tolist()


def test_golden_covers_exactly_the_cases(golden: dict[str, np.ndarray]) -> None:
    assert {key.partition("/")[0] for key in golden} == set(tiny.CASES)


@pytest.mark.parametrize("name", tiny.CASES)
def test_chunked_prefill_has_the_same_bits(name: str) -> None:
    config = tiny.CASES[name]
    backend, prompt = tiny.load(config), tiny.prompt_of(config)
    whole = tiny.logits_of(backend, prompt)
    for chunks in ([1] * len(prompt), [5, 16, 1, 26], [47, 1], [33, 15]):
        assert np.array_equal(tiny.logits_of(backend, prompt, chunks, slot=1), whole)


@pytest.mark.oracle
@pytest.mark.parametrize("name", tiny.CASES)
def test_logits_equal_transformers(name: str) -> None:
    pytest.importorskip("torch", reason="the extra oracle is not installed")
    pytest.importorskip("transformers", reason="the extra oracle is not installed")
    sys.path.insert(0, str(ROOT / "scripts"))
    import make_golden_tiny

    config = tiny.CASES[name]
    prompt = tiny.prompt_of(config, count=61, seed=7)
    expected = make_golden_tiny.logits(make_golden_tiny.oracle(config), prompt)
    np.testing.assert_allclose(tiny.logits_of(tiny.load(config), prompt), expected, atol=1e-4, rtol=0)
