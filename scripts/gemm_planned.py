"""What products are planned to take on cards without wgmma, beside each card's floor; needs no GPU.

    PYTHONPATH=src python scripts/gemm_planned.py          # the tables of docs/performance/other-cards.md

Nothing of it is measured. The floor of a product is the larger of its bytes over the memory's rate and its
operations over the tensor cores' rate, as data sheets have them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from rvllm.backends.cuda.known_gpus import KNOWN
from rvllm.backends.cuda.ops.gemm import plan as gemm
from rvllm.backends.cuda.ops.gemm import sm80
from rvllm.backends.cuda.ops.gemm.common import fit
from rvllm.backends.cuda.ops.gemm.cost import Work
from rvllm.kernels.gemm.specs import MmaTile

TOKENS = (1, 8, 32, 128, 512, 8192)
CLOCKS = {  # at boost, and multiply-adds of mma.sync a cycle and multiprocessor
    "a100-80gb": (1.41e9, 1024),
    "l40s": (2.52e9, 512),
    "rtx-4090": (2.52e9, 256),
    "rtx-5090": (2.41e9, 256),
}
MODELS = {  # layers, products of a layer, the head: rows and K
    "Qwen2.5-7B": (
        28,
        {"qkv": (4608, 3584), "o": (3584, 3584), "gate_up": (37888, 3584), "down": (3584, 18944)},
        (152064, 3584),
    ),
    "Qwen3-8B": (
        36,
        {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (24576, 4096), "down": (4096, 12288)},
        (151936, 4096),
    ),
}
# The kernel before November 2026: four warps below each other, and a rule.
BEFORE = {16: MmaTile(64, 16, 4, 1, 4), 64: MmaTile(64, 64, 4, 1, 3)}


@dataclass(frozen=True)
class Planned:
    """Seconds of a product, of its floor, and by the kernel before; way: its tile and K's blocks."""

    seconds: float
    floor: float
    before: float
    way: str


class Model:
    """A card's products."""

    def __init__(self, name: str) -> None:
        self.facts = KNOWN[name]
        self.clock, fmas = CLOCKS[name]
        sms = self.facts.sm_count
        self.rate, self.flops = self.facts.memory_rate, 2 * fmas * sms * self.clock
        known = sm80.card_of(self.facts.capability)
        self.card = replace(known, fmas=fmas, memory=self.rate / self.clock / sms)

    def product(self, n: int, k: int, tokens: int) -> Planned:
        """y [tokens, n] = x [tokens, k] W^T, as `plan_gemm` would launch it here."""
        facts = self.facts
        plan = gemm.plan_gemm(n, k, tokens, "bf16", facts.sm_count, facts.capability)
        way = sm80.way_of(plan.mode, plan.token_tile)
        work = Work(n, tokens, plan.blocks, plan.segments, facts.sm_count)
        old = sm80.Way(BEFORE[fit(tuple(BEFORE), tokens)], split=False)
        floor = max(2 * (n * k + tokens * (n + k)) / self.rate, 2 * n * k * tokens / self.flops)
        return Planned(
            sm80.cycles(way, work, self.card) / self.clock,
            floor,
            sm80.cycles(old, work, self.card) / self.clock,
            f"{way.tile.rows}x{way.tile.tokens}" + (f"/{plan.grid[2]}" if way.split else ""),
        )


def table(card: str, model: str) -> list[str]:
    """Markdown: a row a product, a column a number of tokens; last a step, and the kernel before."""
    layers, products, head = MODELS[model]
    on = Model(card)
    lines = [
        f"| {model}, {on.facts.name} | " + " | ".join(f"{tokens:,}" for tokens in TOKENS) + " |",
        "| --- |" + " ---: |" * len(TOKENS),
    ]
    cells: dict[str, list[Planned]] = {}
    for name, (n, k) in {**products, "lm_head": head}.items():
        rows = [on.product(n, k, min(tokens, 512) if name == "lm_head" else tokens) for tokens in TOKENS]
        cells[name] = rows
        text = (f"{p.seconds * 1e6:,.0f} ({p.floor / p.seconds:.0%}) {p.way}" for p in rows)
        lines.append(f"| {name} {n} x {k} | " + " | ".join(text) + " |")
    steps = []
    for at, _ in enumerate(TOKENS):
        counted = [(layers if name in products else 1, found[at]) for name, found in cells.items()]
        total, floor, before = (
            1e3 * sum(count * getattr(p, field) for count, p in counted)
            for field in ("seconds", "floor", "before")
        )
        steps.append(f"{total:,.1f} ({floor / total:.0%}; before {before:,.1f})")
    return [*lines, "| all, ms | " + " | ".join(steps) + " |", ""]


if __name__ == "__main__":
    for card in CLOCKS:
        for model in MODELS:
            print("\n".join(table(card, model)))
