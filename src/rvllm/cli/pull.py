"""`rvllm pull`: fetch a model into the cache."""

from __future__ import annotations

import argparse
from typing import Any

from rvllm.cli.common.models import fetch


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "pull",
        help="fetch a model into the cache",
        description="Fetches a model into the cache, unless it is there, and checks that it can be opened.",
    )
    parser.add_argument("model", help="smollm2-135m, org/name[@revision][:file.gguf], or a path")
    parser.add_argument(
        "--print-path", action="store_true", help="print the model's file or folder and nothing else"
    )


def main(args: argparse.Namespace) -> int:
    """Runs `rvllm pull`; raises RvllmError."""
    from rvllm.weights.open import open_checkpoint

    path = fetch(args.model)
    checkpoint = open_checkpoint(path)
    if args.print_path:
        print(path)
    else:
        kind = (checkpoint.config.get("architectures") or ["unknown architecture"])[0]
        print(f"{args.model}: {kind}, {len(checkpoint.tensors)} tensors, in {path}")
    return 0
