"""Writes tests/golden/encoders: sentence vectors by Transformers, pooled as sentence-transformers does.

Needs torch and transformers (the oracle extra) and all-MiniLM-L6-v2, which is fetched when absent. Run from
the repository's root:

    python scripts/make_golden_encoders.py
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from support.models import archs_tiny as tiny  # noqa: E402
from support.models import encoders_tiny as encoders  # noqa: E402
from support.models.fetched import model_path  # noqa: E402
from support.models.oracle_encoders import oracle  # noqa: E402

GOLDEN = ROOT / "tests" / "golden" / "encoders"


def main() -> None:
    transformers.logging.set_verbosity_error()
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for name, case in encoders.CASES.items():
        with tempfile.TemporaryDirectory() as directory:
            path = encoders.save(Path(directory), name)
            vectors = oracle(path, encoders.token_texts(name), case["how"], case["normalise"])
        found = {
            "transformers": transformers.__version__,
            "weights_sha256": tiny.digest(tiny.random_tensors(name, case["config"])),
            "vectors": [[float(f"{x:.7g}") for x in row] for row in vectors.astype(np.float64).tolist()],
        }
        (GOLDEN / f"{name}.json").write_text(json.dumps(found) + "\n")
    path = model_path("minilm-l6-v2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    texts = [tokenizer(text, truncation=True, max_length=256)["input_ids"] for text in encoders.sentences()]
    np.savez_compressed(
        GOLDEN / "minilm.npz",
        lengths=np.array([len(text) for text in texts], np.int32),
        vectors=oracle(path, texts, "mean", True),
    )


if __name__ == "__main__":
    main()
