"""Times the kernels of latent attention at DeepSeek-V2-Lite's sizes, on the GPU of this machine.

    PYTHONPATH=src python scripts/gpu/latent_bench.py [--heads 16]

Each figure is microseconds a layer, a median over replays of a CUDA graph that chains layers with
programmatic launches; each layer has weights and a cache of its own. `layer` is the chain of all three. The
floor is the bytes that have to be read over the GPU's peak rate.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from rvllm.backends.cuda.device.driver import call
from rvllm.backends.cuda.ops.attention.plan import prefill_tiles, table_stride
from rvllm.backends.cuda.ops.mla.plan import LatentShape, plan_decode, plan_prefill
from rvllm.kernels.mla.specs import product_chunks, product_smem
from rvllm.program.dtypes import DType
from support.kernels.harness import BF16, Array, Gpu

LAYERS = 8
RANK, ROTATED, PLAIN, VALUE = 512, 64, 128, 128
WIDTH = RANK + ROTATED
STEPS = [(1, 64), (1, 500), (1, 2000), (1, 8000), (1, 32000), (8, 500), (8, 4000), (64, 500), (64, 2000)]


class Bench:
    """A step of sequences with equal contexts over `LAYERS` layers."""

    def __init__(self, gpu: Gpu, heads: int, seqs: int, context: int, query: int = 1) -> None:
        self.gpu, self.heads, self.seqs, self.context, self.query = gpu, heads, seqs, context, query
        tokens, blocks = seqs * query, -(-context // 16)
        self.tokens, self.stride = tokens, table_stride(context)
        table = np.zeros((seqs, self.stride), np.int32)
        table[:, :blocks] = np.arange(seqs * blocks).reshape(seqs, blocks)
        positions = np.tile(np.arange(context - query, context), seqs)
        ints = (np.int32, table, positions, np.repeat(np.arange(seqs), query), np.arange(seqs))
        self.table, self.positions, self.owners, self.slots = (gpu.array(a, ints[0]) for a in ints[1:])
        self.kv_lens, self.count = gpu.array(np.full(seqs, context, np.int32)), gpu.array([tokens], np.int32)
        self.decodes = gpu.array([seqs if query == 1 else 0], np.int32)
        self.offsets = gpu.array(np.arange(seqs + 1, dtype=np.int32) * query)
        self.caches = [self.zeros((seqs * blocks, 16, WIDTH)) for _ in range(LAYERS)]
        self.into = [self.zeros((heads, RANK, PLAIN)) for _ in range(LAYERS)]
        self.out_of = [self.zeros((heads, VALUE, RANK)) for _ in range(LAYERS)]
        self.norm = gpu.array(np.ones(RANK, np.float32))
        self.angles = gpu.array(np.ones((context, ROTATED // 2), np.float32))
        self.x, self.q = self.zeros((tokens, heads * 192 + WIDTH)), self.zeros((tokens, heads * WIDTH))
        self.mixed, self.values = self.zeros((tokens, heads * RANK)), self.zeros((tokens, heads * VALUE))
        facts, shape = gpu.facts, LatentShape(heads, RANK, ROTATED)
        self.decode = plan_decode(
            DType.BF16, shape, max_seqs=seqs, max_model_len=context, num_blocks=10**6,
            sm_count=facts.sm_count, smem_per_block=facts.smem_per_block,
        )  # fmt: skip
        self.partial = gpu.empty((self.decode.partial_bytes // 4,), np.float32)
        self.gatherings = gpu.zeros((seqs * shape.parts, 4), np.int32)
        self.prefill = plan_prefill(DType.BF16, shape, facts.smem_per_block)
        lens = np.full(seqs, query, np.int32)
        tiles = prefill_tiles(lens, np.full(seqs, context, np.int32), 0, heads, self.prefill.rows)
        self.tiles, self.num_tiles = gpu.array(tiles), len(tiles)
        self.eights = 1 if tokens <= 8 else 8

    def zeros(self, shape: Sequence[int]) -> Array:
        """Zeros of the model's type, made on the device."""
        array = self.gpu.empty(tuple(shape), BF16)
        call("cuMemsetD8", array.address, 0, array.nbytes)
        return array

    def prepare(self, i: int) -> None:
        """Queues latent_prepare of a layer."""
        grid = (self.heads * product_chunks(RANK, PLAIN) + self.eights, -(-self.tokens // (8 * self.eights)))
        pitch = self.x.shape[1]
        turn = i % LAYERS
        args = [self.q, self.x, self.x, self.into[turn], self.caches[turn], self.norm, self.angles,
                self.angles, self.table, self.positions, self.owners, self.count, self.tokens, pitch, pitch,
                self.heads, RANK, PLAIN, ROTATED, self.stride, 1e-6]  # fmt: skip
        name = f"sm80_bf16_latent_prepare_interleaved_n{8 * self.eights}"
        self.gpu.launch(name, grid, 128, args, product_smem(PLAIN, self.eights))

    def attend(self, i: int) -> None:
        """Queues latent_decode or latent_prefill of a layer."""
        shared = [self.mixed, self.q, self.caches[i % LAYERS], self.table, self.slots, self.kv_lens]
        numbers = [WIDTH, RANK, self.heads, self.stride, 0.1]
        if self.query == 1:
            args = [
                *shared,
                self.decodes,
                self.partial,
                self.gatherings,
                *numbers,
                self.seqs,
                self.decode.spare,
            ]
            self.gpu.launch(self.decode.kernel, self.decode.grid, self.decode.block, args, self.decode.smem)
        else:
            args = [*shared, self.offsets, self.tiles, *numbers]
            plan = self.prefill
            self.gpu.launch(plan.kernel, self.num_tiles, plan.block, args, plan.smem)

    def product(self, i: int) -> None:
        """Queues latent_merge and the product of a layer."""
        args = [self.mixed, self.partial, self.gatherings, self.decodes, self.heads, RANK, self.decode.grid,
                self.decode.spare]  # fmt: skip
        self.gpu.launch("sm80_bf16_latent_merge", (self.heads, self.tokens), 128, args)
        grid = (self.heads * product_chunks(VALUE, RANK), -(-self.tokens // (8 * self.eights)))
        args = [self.values, self.mixed, self.out_of[i % LAYERS], self.tokens, self.heads, VALUE, RANK, 0]
        name = f"sm80_bf16_head_linear_n{8 * self.eights}"
        self.gpu.launch(name, grid, 128, args, product_smem(RANK, self.eights))

    def layer(self, i: int) -> None:
        """Queues all of a layer."""
        self.prepare(i)
        self.attend(i)
        self.product(i)

    def times(self) -> list[float]:
        """Microseconds of preparing, attention, values and all three."""
        works: list[Callable[[int], None]] = [self.prepare, self.attend, self.product, self.layer]
        return [1e6 * self.gpu.time(work, repeats=2 * LAYERS, replays=5) for work in works]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--heads", type=int, default=16)
    heads = parser.parse_args().heads
    gpu = Gpu()
    rate = gpu.facts.memory_rate or 1e12
    head = f"{'seqs':>5} {'query':>6} {'context':>8}"
    print(
        f"{head} {'prepare':>8} {'attend':>8} {'values':>8} {'layer':>8} {'floor':>8}   TFLOP/s of attention"
    )
    for seqs, context, query in [*((n, c, 1) for n, c in STEPS), (1, 1024, 1024), (1, 8192, 8192)]:
        bench = Bench(gpu, heads, seqs, context, query)
        times = bench.times()
        nbytes = 2 * (seqs * context * WIDTH + heads * RANK * (PLAIN + VALUE))
        pairs = seqs * (context - (query - 1) / 2) * query
        flops = 2 * pairs * heads * (WIDTH + RANK)
        shown = " ".join(f"{t:8.2f}" for t in (*times, 1e6 * nbytes / rate))
        print(f"{seqs:5} {query:6} {context:8} {shown}   {flops / times[1] / 1e6:8.1f}", flush=True)
        gpu.clear()


if __name__ == "__main__":
    main()
