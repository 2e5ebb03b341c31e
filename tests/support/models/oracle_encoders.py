"""Sentence vectors by Transformers, pooled as sentence-transformers does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest


def pooled(hidden: Any, how: str, normalise: bool) -> Any:
    """sentence-transformers' Pooling and Normalize of one text's last hidden states [L, width]."""
    torch = pytest.importorskip("torch")
    vector = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[how]
    return (torch.nn.functional.normalize(vector, dim=0) if normalise else vector).numpy()


def oracle(path: Path, texts: list[list[int]], how: str, normalise: bool) -> np.ndarray:
    """Transformers' encoder, one text at a time."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    model, report = transformers.AutoModel.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True
    )
    assert not report["unexpected_keys"], report
    assert all("pooler" in name for name in report["missing_keys"]), report
    with torch.no_grad():
        return np.stack([pooled(model.eval()(torch.tensor([t]))[0][0], how, normalise) for t in texts])
