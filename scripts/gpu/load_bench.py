"""Real weights from the page cache to the first token: a checkpoint is written, and loaded several times.

    PYTHONPATH=src python scripts/gpu/load_bench.py CONFIG_DIR FOLDER [--times 3] [--device cuda]

FOLDER gets safetensors of random bfloat16 numbers, in files of 4 GB, under the names that the configuration's
model has. Each load is a process of its own, as `rvllm serve` starts its engine's.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from rvllm.models.config import ModelConfig
from rvllm.models.registry import build_program
from rvllm.program.dtypes import DType

FILE = 4 << 30  # bytes
LOAD = """
import sys, time
began = time.perf_counter()
from rvllm.backends import opening
from rvllm.config import EngineConfig
config = EngineConfig(model=sys.argv[1], device=sys.argv[2], max_model_len=1024, max_num_seqs=8,
                      num_blocks=512)
opening.begin(config)
from rvllm.engine.core import EngineCore
from rvllm.engine.ipc.messages import Generate, Sampling
imported = time.perf_counter() - began
core = EngineCore.from_config(config)
loaded = time.perf_counter() - began
core.add_request(Generate("a", list(range(5, 37)), Sampling(max_tokens=1)))
tokens = []
while core.has_work():
    tokens += [token for output in core.step() for token in output.token_ids]
print(f"engine imported after {imported:.2f} s, loaded after {loaded:.2f} s,",
      f"first token after {time.perf_counter() - began:.2f} s;",
      ", ".join(f"{name} {seconds:.2f}" for name, seconds in core.ready.phases), tokens)
core.close()
"""


def write(config: Path, folder: Path) -> int:
    """Writes the checkpoint; returns its bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(config / "config.json", folder)
    values = json.loads((config / "config.json").read_text())
    program = build_program(ModelConfig(values, "config"), DType.BF16)
    noise = (np.random.default_rng(1).standard_normal(1 << 22, dtype=np.float32) * 0.02).astype(
        ml_dtypes.bfloat16
    )
    shapes: dict[str, tuple[int, ...]] = {}
    for weight in program.weights:
        for part in weight.parts:
            shapes.setdefault(part.source, part.shape)
    files: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        nbytes = 2 * int(np.prod(shape))
        if size + nbytes > FILE and files[-1]:
            files.append({})
            size = 0
        files[-1][name], size = shape, size + nbytes
    total = 0
    for number, held in enumerate(files, 1):
        header, at = {}, 0
        for name, shape in held.items():
            end = at + 2 * int(np.prod(shape))
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, end]}
            at = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        suffix = f"-{number:05}-of-{len(files):05}" if len(files) > 1 else ""
        with (folder / f"model{suffix}.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            left = at
            while left:
                piece = noise.view(np.uint8)[: min(left, noise.nbytes)]
                file.write(piece.data)
                left -= len(piece)
        total += at
    if len(files) > 1:
        index = {
            n: f"model-{i:05}-of-{len(files):05}.safetensors" for i, held in enumerate(files, 1) for n in held
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return total


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    began = time.perf_counter()
    total = write(args.config, args.folder)
    print(f"{total / 1e9:.2f} GB written in {time.perf_counter() - began:.1f} s", flush=True)
    for _ in range(args.times):
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", LOAD, str(args.folder), args.device],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"PYTHONDONTWRITEBYTECODE": ""},  # compiled once, as an installed package is
        )
        print(done.stdout.strip() or done.stderr[-2000:])
        print(f"the process took {time.perf_counter() - began:.2f} s", flush=True)


if __name__ == "__main__":
    main()
