"""Times the kernels of Mamba-2 layers at real models' sizes, on the GPU of this machine.

    PYTHONPATH=src python scripts/gpu/recurrent_bench.py [--only NAME] [--decode 1,64,256] [--prompt 2048]

Each row is a median over replays of a CUDA graph that chains launches with programmatic dependence, each on
another layer's states, so that these come from memory, not from a cache. Bytes are what a launch must move:
for decode states, the newest chunk, inputs and outputs; sequences stand at all offsets within a chunk.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from rvllm.backends.cuda.ops.mamba2 import CONV_THREADS, KEEP_THREADS, SCAN_ROWS, ConvAt, conv_tile
from rvllm.kernels.mamba2.specs import conv_kernel, gated_norm_kernel, scan_kernel, scan_smem
from rvllm.program.ops.mamba2 import CHUNK, CausalConv, StateScan
from support.kernels.harness import BF16, Array, Gpu
from support.kernels.recurrent_checks import Meta

TAPS, LAYERS = 4, 24


@dataclass(frozen=True)
class Size:
    """Dimensions of a model's Mamba-2 layers."""

    heads: int
    dim: int
    groups: int
    size: int

    @property
    def inner(self) -> int:
        """Width of what is scanned."""
        return self.heads * self.dim

    @property
    def wide(self) -> int:
        """Width of what is convolved."""
        return self.inner + 2 * self.groups * self.size

    @property
    def pitch(self) -> int:
        """Width of the projection: gate, convolved columns, time steps."""
        return self.inner + self.wide + self.heads


MODELS = {
    "nemotron-h-8b": Size(128, 64, 8, 128),
    "nemotron-nano-9b-v2": Size(128, 80, 8, 128),
    "nemotron-3-nano-30b-a3b": Size(64, 64, 8, 128),
    "nemotron-h-56b": Size(256, 64, 8, 256),
}
Work = Callable[[int], None]


class Layers:
    """States of several layers and the inputs of a step; launches as the backend plans them."""

    def __init__(self, gpu: Gpu, s: Size, lengths: list[int], starts: list[int]) -> None:
        self.gpu, self.s, seqs = gpu, s, len(lengths)
        parts = [(i, at, n) for i, (at, n) in enumerate(zip(starts, lengths, strict=True))]
        self.meta, self.prompts = Meta(gpu, parts, np.arange(seqs)), max(lengths) > 1
        self.tokens, self.seqs = sum(lengths), seqs
        self.layers = LAYERS if seqs < 32 else 3
        self.conv_elements = CausalConv.elements(s.wide, TAPS)
        self.scan_elements = StateScan.elements(s.heads, s.dim, s.groups, s.size)
        self.conv_states = [gpu.zeros((seqs, self.conv_elements), np.float32) for _ in range(self.layers)]
        self.scan_states = [gpu.zeros((seqs, self.scan_elements), np.float32) for _ in range(self.layers)]
        rng = np.random.default_rng(0)

        def normal(*shape: int) -> Array:
            return gpu.array(rng.standard_normal(shape, np.float32).astype(BF16))

        self.both, self.xbc = normal(self.tokens, s.pitch), normal(self.tokens, s.wide)
        self.scanned, self.out = normal(self.tokens, s.inner), gpu.empty((self.tokens, s.inner), BF16)
        self.vectors = [gpu.array(rng.standard_normal(s.heads).astype(np.float32)) for _ in range(3)]
        self.taps = gpu.array(rng.standard_normal((s.wide, TAPS)).astype(np.float32))
        self.norm = gpu.array(np.ones(max(s.inner, s.wide), np.float32))

    def conv(self, i: int) -> None:
        """The convolution of layer i."""
        tile, m, s = conv_tile(self.tokens, self.prompts), self.meta, self.s
        args = [self.xbc, self.both, self.taps, self.norm, self.conv_states[i % self.layers], m.header,
                m.positions, m.token_slots, m.offsets, s.wide, s.pitch, self.conv_elements, tile]  # fmt: skip
        grid = (-(-s.wide // 8 // CONV_THREADS), -(-self.tokens // tile))
        self.gpu.launch(conv_kernel("bfloat16", TAPS, "silu"), grid, CONV_THREADS, args)

    def _sequences(self, i: int) -> list[object]:
        m, s = self.meta, self.s
        return [self.scan_states[i % self.layers], m.count, m.seq_slots, m.kv_lens, m.offsets,
                self.scan_elements, s.pitch, s.heads, s.dim, s.groups]  # fmt: skip

    def scan(self, i: int) -> None:
        """The scan of layer i."""
        self._scan(i, ConvAt())

    def conv_scan(self, i: int) -> None:
        """The scan of layer i with its convolution, for decode."""
        inputs, s = self.conv_states[i % self.layers], self.s
        where = self.both.address, self.taps.address, self.norm.address, inputs.address
        self._scan(i, ConvAt(*where, s.pitch, self.conv_elements))

    def _scan(self, i: int, conv: ConvAt) -> None:
        s = self.s
        rows = min(self.seqs, SCAN_ROWS) if self.prompts else self.seqs
        args = [self.scanned, self.xbc, self.both, *self.vectors, *self._sequences(i), 0.001,
                int(not self.prompts), conv]  # fmt: skip
        kernel = scan_kernel("bfloat16", s.dim, s.size, conv=bool(conv.x))
        self.gpu.launch(kernel, (s.heads, rows), 2 * s.dim, args, smem=scan_smem(s.dim, s.size))

    def keep(self, i: int) -> None:
        """The newest chunk of layer i."""
        vectors = (self.s.inner + self.s.groups * self.s.size) // 8
        args = [self.xbc, self.both, *self._sequences(i), self.s.size]
        grid = (-(-vectors // KEEP_THREADS), min(self.seqs, SCAN_ROWS))
        self.gpu.launch("sm80_bf16_scan_keep", grid, KEEP_THREADS, args)

    def gated_norm(self, i: int) -> None:
        """The gated norm of layer i."""
        s = self.s
        group = s.inner // s.groups
        kernel, threads = gated_norm_kernel("bfloat16", group)
        args = [self.out, self.scanned, self.both, self.norm, s.inner, s.pitch, group, 1e-5]
        self.gpu.launch(kernel, (s.groups, self.tokens), threads, args)

    def moved(self) -> dict[str, float]:
        """Bytes each launch must move; decode writes a state every 16th token."""
        s, t = self.s, self.tokens
        state = 4 * s.inner * s.size
        kept = 2 * (s.inner + s.groups * s.size + s.heads)
        if self.prompts:
            scan = 2 * t * (s.wide + s.inner + s.heads) + self.seqs * state
        else:
            scan = self.seqs * (state * (1 + 1 / CHUNK) + kept * CHUNK / 2) + 2 * t * (s.wide + s.inner)
        conv = 4 * t * s.wide + 4 * self.seqs * self.conv_elements
        norm = 6.0 * t * s.inner
        return {"conv": conv, "scan": scan, "conv_scan": conv + scan, "keep": kept, "gated_norm": norm}


def rows(gpu: Gpu, name: str, what: str, lengths: list[int], starts: list[int]) -> None:
    """Times each launch alone and the layer's together, and prints them."""
    layers = Layers(gpu, MODELS[name], lengths, starts)
    kinds = ["conv", "scan", "keep", "gated_norm"] if layers.prompts else ["conv_scan", "gated_norm"]
    works: dict[str, Work] = {kind: getattr(layers, kind) for kind in kinds}

    def together(i: int) -> None:
        for kind in kinds:
            works[kind](i)

    moved = layers.moved()
    for kind, work in (*works.items(), ("all", together)):
        seconds = gpu.time(work, repeats=LAYERS)
        nbytes = moved.get(kind) or sum(moved[k] for k in kinds)
        print(
            f"{name:26} {what:16} {kind:11} {1e6 * seconds:9.2f} us {nbytes / seconds / 1e12:6.2f} TB/s",
            flush=True,
        )
    gpu.clear()


def main() -> None:
    """Runs what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=MODELS, action="append")
    parser.add_argument("--decode", default="1,8,64,256", help="sequences of a decode step")
    parser.add_argument("--prompt", default="16,2048", help="tokens of one prompt")
    asked = parser.parse_args()
    gpu = Gpu()
    for name in asked.only or MODELS:
        for seqs in map(int, filter(None, asked.decode.split(","))):
            rows(gpu, name, f"decode of {seqs}", [1] * seqs, [512 + 7 * i % 64 for i in range(seqs)])
        for tokens in map(int, filter(None, asked.prompt.split(","))):
            rows(gpu, name, f"prompt of {tokens}", [tokens], [0])


if __name__ == "__main__":
    main()
