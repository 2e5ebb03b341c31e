"""Log-probabilities of a row of logits, on the host."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rvllm.backends.base import TokenLogprobs

F32 = NDArray[np.float32]


def top_logprobs(logits: F32, token: int, count: int) -> TokenLogprobs:
    """Log-probabilities of a row [vocab]: the token's, its rank, and the `count` most likely."""
    top = logits.max()
    norm = np.float64(top) + np.log(np.exp(logits - top, dtype=np.float64).sum())
    ids = np.empty(0, dtype=np.int32)
    if count > 0:
        count = min(count, len(logits))
        largest = np.flatnonzero(logits >= np.partition(logits, -count)[-count])
        ids = largest[np.argsort(-logits[largest], kind="stable")][:count].astype(np.int32)
    return TokenLogprobs(
        token_id=token,
        logprob=float(np.float32(logits[token] - norm)),  # rounded as the top ones, so that equals stay equal
        rank=1 + int(np.count_nonzero(logits > logits[token])),
        top_ids=ids.tolist(),
        top_logprobs=(logits[ids] - norm).astype(np.float32).tolist(),
    )
