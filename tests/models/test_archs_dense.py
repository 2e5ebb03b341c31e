"""Dense architectures on tiny random checkpoints, against Transformers (marker oracle)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import archs_tiny as tiny
import numpy as np
import pytest

CHUNKS = (5, 1, 64, 3, 40, 24)


def oracle(path: Path) -> Any:
    """Transformers' model with the checkpoint's weights; refuses missing or unused tensors."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    transformers.logging.set_verbosity_error()
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"], report
    assert not report["unexpected_keys"], report
    assert not report["mismatched_keys"], report
    return model.eval()


@pytest.mark.oracle
@pytest.mark.parametrize("name", tiny.CASES)
def test_equals_transformers(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    case = tiny.CASES[name]
    tiny.save(tmp_path, case.config, tiny.random_tensors(name, case.config))
    backend = tiny.load(tmp_path, case.max_model_len)
    prompt = tiny.prompt_of(name)
    model = oracle(tmp_path)

    ours = tiny.all_logits(backend, prompt, (len(prompt),))
    with torch.no_grad():
        theirs = model(torch.from_numpy(prompt)[None].long()).logits[0].numpy()
    assert np.abs(theirs).max() > 1.0  # a comparison of near-zeros would show nothing
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)

    pieces = tiny.all_logits(backend, prompt, CHUNKS)
    assert np.array_equal(ours, pieces)

    tokens = torch.from_numpy(prompt)[None].long()
    with torch.no_grad():
        for _ in range(tiny.GREEDY):
            best = model(tokens).logits[:, -1].argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, best], dim=1)
    assert tiny.greedy(backend, prompt, tiny.GREEDY) == tokens[0, len(prompt) :].tolist()
    backend.close()
