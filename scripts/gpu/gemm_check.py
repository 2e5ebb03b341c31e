"""Checks every matrix kernel on this GPU: right, complete, nothing outside, the same bits in any batch.

    PYTHONPATH=src:scripts/gpu python scripts/gpu/gemm_check.py [--quick]

Fresh random inputs; references in float64; outputs poisoned before each launch. Exits with 1 on a failure.
"""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np
import torch
from gemm_bed import TORCH, Bed

from rvllm.backends.cuda.ops.gemm import plan as gemm
from rvllm.backends.cuda.ops.gemm import sm80
from rvllm.backends.cuda.ops.gemm.common import Kind

SHAPES = [(203, 72), (64, 8), (1000, 264), (576, 576), (1536, 576), (896, 4864), (3584, 3584), (4608, 3584),
          (17000, 1160), (37888, 3584), (49152, 576), (151937, 896)]  # fmt: skip
SMALL_SHAPES = [(203, 72), (208, 72), (1000, 264)]
MANY_SHAPES = [*SMALL_SHAPES, (17000, 1160), (17003, 72), (37888, 3584), (3584, 3584), (4200, 1160)]
TOKENS = [1, 2, 3, 7, 8, 9, 16, 31, 64, 100, 128, 129, 200, 256, 300, 512, 1000]
GUARD = 64  # poisoned rows behind the output


class Checker:
    def __init__(self, bed: Bed) -> None:
        self.bed = bed
        self.failures: list[str] = []
        self.launches = 0
        self.worst = 0.0

    def expect(self, good: bool, what: str) -> None:
        if not good:
            self.failures.append(what)
            if len(self.failures) < 30:
                print("FAIL", what, flush=True)

    def run(self, plan: gemm.GemmPlan, x: torch.Tensor, packed: torch.Tensor, dtype: str, width: int,
            poison: bool = True, **options: object) -> torch.Tensor:  # fmt: skip
        """Launches into poison; returns the rows written after checking that the rest is untouched."""
        logits = options.get("kind") == Kind.LOGITS
        out_type = torch.float32 if logits else TORCH[dtype]
        raw = torch.int32 if logits else torch.int16
        rows = plan.tokens + GUARD
        out = torch.full((rows, width), -1, dtype=raw, device="cuda").view(out_type)
        torch.cuda.synchronize()
        self.bed.launch(plan, x, packed.data_ptr(), out, dtype, **options).run(self.bed.stream, plan.grid)
        self.bed.stream.sync()
        self.launches += 1
        name = f"{plan.kernel} t={plan.tokens} n={plan.rows} k={x.shape[1]} {options.get('kind', '')}"
        self.expect(bool((out[plan.tokens :].view(raw) == -1).all()), f"{name}: wrote behind its rows")
        if poison:
            left = (out[: plan.tokens].view(raw) == -1).any()
            self.expect(not bool(left), f"{name}: left elements unwritten")
        return out[: plan.tokens]

    def best(self, plan: gemm.GemmPlan, x: torch.Tensor, packed: torch.Tensor, dtype: str,
             logits: torch.Tensor, **options: object) -> None:  # fmt: skip
        """Where the best alone is wanted, each row begins with the (logit, id) of every 64 of its logits."""
        tokens, n = plan.tokens, logits.shape[1]
        tiles, flag = -(-n // 64), torch.ones(1, dtype=torch.int32, device="cuda")
        out = torch.full((tokens + GUARD, -(-n // 8) * 8), -1, dtype=torch.int32, device="cuda").view(
            torch.float32
        )
        torch.cuda.synchronize()
        options = {"kind": Kind.LOGITS, "residual": flag.data_ptr(), **options}
        self.bed.launch(plan, x, packed.data_ptr(), out, dtype, **options).run(self.bed.stream, plan.grid)
        self.bed.stream.sync()
        self.launches += 1
        raw = out.view(torch.int32)
        padded = torch.full((tokens, tiles * 64), -torch.inf, device="cuda")
        padded[:, :n] = logits[:tokens]
        values, ids = padded.view(tokens, tiles, 64).max(dim=2)
        ids = torch.argmax(
            (padded.view(tokens, tiles, 64) == values[..., None]).int(), dim=2
        )  # the first of equals
        found = raw[:tokens, : 2 * tiles].reshape(tokens, tiles, 2)
        same = torch.equal(found[..., 0].contiguous().view(torch.float32), values)
        same &= torch.equal(found[..., 1], (ids + 64 * torch.arange(tiles, device="cuda")).int())
        clean = bool((raw[tokens:] == -1).all()) and bool((raw[:, 2 * tiles :] == -1).all())
        self.expect(same and clean, f"{plan.kernel} t={tokens} n={n} k={x.shape[1]}: best {same} {clean}")

    def variants(self, n: int, k: int, tokens: int, dtype: str) -> list[gemm.GemmPlan]:
        sms = self.bed.facts.sm_count
        modes: tuple[gemm.Mode, ...] = ("split", "sum")
        if gemm.segments_of(n, k) == gemm.PAIR_SEGMENTS:
            modes += ("pair",)
        if gemm.segments_of(n, k) == 1:
            modes += ("walk", "flow", "tall")
        else:
            modes += ("wide", "eight")
        ways = [(mode, tile) for mode in modes for tile in gemm.token_tiles(mode)]
        return [gemm.variant(n, k, tokens, dtype, mode, tile, sms) for mode, tile in ways]

    def sm80_variants(self, n: int, k: int, tokens: int, dtype: str) -> list[gemm.GemmPlan]:
        """Every tile and split with the rings of two cards: one with much shared memory, one with little."""
        ways = sm80.ways_of(gemm.segments_of(n, k), tokens)
        return [
            gemm.variant(n, k, tokens, dtype, way.mode, way.tile.tokens, sms, capability=card)
            for way in ways
            for card, sms in ((80, self.bed.facts.sm_count), (86, 8))
        ]

    def shape(self, n: int, k: int, dtype: str, token_list: list[int]) -> None:
        """Bits equal over every variant and batch; error against float64."""
        most = max(token_list)
        x = torch.randn(most, k, device="cuda").to(TORCH[dtype])
        w = (torch.randn(n, k, device="cuda") * k**-0.5).to(TORCH[dtype])
        packed = self.bed.pack(w, dtype)
        exact = x.double() @ w.double().T
        logits = {"kind": Kind.LOGITS}
        for family in ("sm90", "sm80"):
            base: torch.Tensor | None = None
            for tokens in sorted(token_list, reverse=True):
                if family == "sm90":
                    plans = self.variants(n, k, tokens, dtype) if self.bed.facts.capability == 90 else []
                else:
                    plans = self.sm80_variants(n, k, tokens, dtype)
                for plan in plans:
                    got = self.run(plan, x, packed, dtype, n, **logits)
                    if base is None:
                        base = got
                        error = float((got.double() - exact).norm() / exact.norm())
                        self.worst = max(self.worst, error)
                        self.expect(error < 2e-5, f"{plan.kernel} n={n} k={k}: relative error {error:.2e}")
                    same = torch.equal(got.view(torch.int32), base[:tokens].view(torch.int32))
                    self.expect(
                        same, f"{plan.kernel} t={tokens} n={n} k={k}: other bits than the largest batch"
                    )
                    if plan.segments == 1 and plan.mode not in ("split", "pair"):
                        self.best(plan, x, packed, dtype, base)
            if base is not None:
                self.epilogues(x, packed, dtype, base, family)
        del exact

    def epilogues(
        self, x: torch.Tensor, packed: torch.Tensor, dtype: str, sums: torch.Tensor, family: str
    ) -> None:
        """Stores, bias, residual, scale and cap from the float32 sums, bit for bit; gates to one rounding."""
        kind, (_, n), k = TORCH[dtype], sums.shape, x.shape[1]
        for tokens in (5, 70, 300):
            if family == "sm80":
                plans = self.sm80_variants(n, k, tokens, dtype)
            else:
                size = 8 if tokens < 9 else 128 if tokens < 129 else 256
                ways: list[tuple[gemm.Mode, int]] = [("split", size), ("sum", 192), ("wide", 256)]
                if gemm.segments_of(n, k) == 1:
                    ways = [("walk", min(size, 128)), ("flow", 256), ("tall", 160), ("sum", 192)]
                sms = self.bed.facts.sm_count
                plans = [gemm.variant(n, k, tokens, dtype, mode, tile, sms) for mode, tile in ways]
            bias = torch.randn(n, device="cuda").to(kind)
            residual = torch.randn(tokens, n, device="cuda").to(kind)
            row = sums[:tokens]
            gates: dict[Kind, torch.Tensor] = {}
            for plan in plans:
                name = f"{plan.kernel} t={tokens} n={n} k={k}"
                got = self.run(plan, x, packed, dtype, n)
                self.expect(torch.equal(got, row.to(kind)), f"{name}: store")
                got = self.run(plan, x, packed, dtype, n, bias=bias.data_ptr(), residual=residual.data_ptr())
                want = (residual.float() + (row + bias.float()).to(kind).float()).to(kind)
                self.expect(torch.equal(got, want), f"{name}: bias and residual")
                got = self.run(plan, x, packed, dtype, n, kind=Kind.LOGITS, scale=0.5, soft_cap=3.0)
                want = 3.0 * torch.tanh(row * 0.5 / 3.0)
                self.expect(torch.allclose(got, want, rtol=1e-5, atol=1e-6), f"{name}: soft cap")
                if n % 16 == 0:
                    halves = row.to(kind).float().view(tokens, n // 16, 2, 8)
                    gate, up = (halves[:, :, i].reshape(tokens, n // 2) for i in (0, 1))
                    functions = torch.nn.functional
                    for which, act in (
                        (Kind.GATED_SILU, functions.silu(gate)),
                        (Kind.GATED_GELU, functions.gelu(gate)),
                        (Kind.GATED_GELU_TANH, functions.gelu(gate, approximate="tanh")),
                    ):
                        got = self.run(plan, x, packed, dtype, n // 2, kind=which)
                        same = torch.equal(got, gates.setdefault(which, got))
                        self.expect(same, f"{name}: {which.name} differs between kernels")
                        tolerance = 2**-7 if dtype == "bf16" else 2**-9
                        want = act * up
                        self.expect(
                            torch.allclose(got.float(), want, rtol=tolerance, atol=1e-6),
                            f"{name}: {which.name}",
                        )

    def every_gate(self) -> None:
        """SiLU of every 16-bit number has the same bits in every kernel that applies it."""
        for dtype, kind in TORCH.items():
            numbers = torch.arange(1 << 16, device="cuda").to(torch.int16).view(kind).view(-1, 1, 8, 1)
            gated = torch.cat([numbers, torch.ones_like(numbers)], dim=1).reshape(-1, 1)
            w = torch.cat([gated, torch.zeros_like(gated).expand(-1, 7)], dim=1).contiguous()
            n = w.shape[0]
            packed = self.bed.pack(w, dtype)
            x = torch.zeros(300, 8, device="cuda", dtype=kind)
            x[:, 0] = 1.0
            silu = {"kind": Kind.GATED_SILU}
            for tokens in (9, 300):
                usual = gemm.variant(n, 8, tokens, dtype, "walk", 128, self.bed.facts.sm_count)
                want = self.run(usual, x, packed, dtype, n // 2, poison=False, **silu)
                for plan in self.variants(n, 8, tokens, dtype):
                    got = self.run(plan, x, packed, dtype, n // 2, poison=False, **silu)
                    same = (got.view(torch.int16) == want.view(torch.int16)) | (got.isnan() & want.isnan())
                    self.expect(bool(same.all()), f"{plan.kernel} t={tokens}: SiLU has other bits")

    def every_kind(self, shapes: list[tuple[int, int]]) -> None:
        """Kernels for many tokens have the bits of those for 128, whatever becomes of the sums."""
        kinds = Kind
        for dtype in TORCH:
            for n, k in shapes:
                if dtype == "f16" and n > 20000:
                    continue
                one = gemm.segments_of(n, k) == 1
                others: list[tuple[gemm.Mode, int]] = [
                    ("flow", 256),
                    ("tall", 32),
                    ("tall", 72),
                    ("tall", 136),
                    ("tall", 192),
                ]
                if not one:
                    others = [("sum", 160), ("sum", 192), ("split", 144), ("split", 256), ("wide", 256)]
                if gemm.segments_of(n, k) == gemm.PAIR_SEGMENTS:
                    others += [("pair", 144), ("pair", 192)]
                x = torch.randn(1000, k, device="cuda").to(TORCH[dtype])
                w = (torch.randn(n, k, device="cuda") * k**-0.5).to(TORCH[dtype])
                packed = self.bed.pack(w, dtype)
                bias = torch.randn(n, device="cuda").to(TORCH[dtype])
                added = torch.randn(1000, n, device="cuda").to(TORCH[dtype])
                for tokens in (1, 70, 128, 129, 192, 256, 257, 300, 384, 512, 600, 1000):
                    sms = self.bed.facts.sm_count
                    usual = gemm.variant(n, k, tokens, dtype, "walk" if one else "sum", 128, sms)
                    ways: list[dict[str, object]] = [
                        {}, {"bias": bias.data_ptr(), "residual": added.data_ptr(), "scale": 0.5},
                        {"kind": kinds.LOGITS}, {"kind": kinds.ACT_GELU},
                        {"kind": kinds.LOGITS, "soft_cap": 3.0, "bias": bias.data_ptr()},
                    ]  # fmt: skip
                    if n % 16 == 0:
                        ways += [{"kind": kinds.GATED_SILU},
                                 {"kind": kinds.GATED_GELU, "bias": bias.data_ptr()},
                                 {"kind": kinds.GATED_CLAMPED, "scale": 1.7, "soft_cap": 1.0}]  # fmt: skip
                    for way in ways:
                        width = n // 2 if Kind.GATED_SILU <= way.get("kind", 0) <= 5 else n
                        want = self.run(usual, x, packed, dtype, width, **way)
                        raw = torch.int32 if want.dtype == torch.float32 else torch.int16
                        for mode, tile in others:
                            plan = gemm.variant(n, k, tokens, dtype, mode, tile, self.bed.facts.sm_count)
                            got = self.run(plan, x, packed, dtype, width, **way)
                            same = torch.equal(got.view(raw), want.view(raw))
                            self.expect(same, f"{plan.kernel} t={tokens} n={n} k={k} {way}: other bits")

    def packing(self) -> None:
        """The pack kernel against NumPy: parts, padding, strides, conversions, gate/up."""
        for dtype, kind in TORCH.items():
            for source in (torch.float32, torch.bfloat16, torch.float16):
                a, b = (torch.randn(rows, 200, device="cuda").to(source) for rows in (67, 130))
                packed = torch.full((gemm.packed_nbytes(197, 200),), 255, dtype=torch.uint8, device="cuda")
                self.bed.pack_part(a, packed, dtype)
                self.bed.pack_part(b, packed, dtype, first=67, padded_rows=256 - 67)
                want = self.bits(torch.cat([a, b]).to(kind))
                self.expect(
                    np.array_equal(packed.cpu().numpy(), gemm.pack_matrix(want)), f"pack {source} {dtype}"
                )
                transposed = b.T.contiguous().T
                packed = self.bed.pack(transposed, dtype)
                want = self.bits(b.to(kind))
                self.expect(
                    np.array_equal(packed.cpu().numpy(), gemm.pack_matrix(want)), f"pack transposed {source}"
                )
                gate, up = (torch.randn(52, 72, device="cuda").to(source) for _ in range(2))
                packed = torch.zeros(
                    gemm.packed_nbytes(gemm.gated_rows(52), 72), dtype=torch.uint8, device="cuda"
                )
                self.bed.pack_part(gate, packed, dtype, interleave=gemm.Interleave.GATE)
                self.bed.pack_part(up, packed, dtype, interleave=gemm.Interleave.UP)
                want = gemm.interleave_gate_up(self.bits(gate.to(kind)), self.bits(up.to(kind)))
                self.expect(
                    np.array_equal(packed.cpu().numpy(), gemm.pack_matrix(want)), f"pack gated {source}"
                )

    @staticmethod
    def bits(tensor: torch.Tensor) -> np.ndarray:
        return tensor.contiguous().view(torch.int16).cpu().numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the small shapes only")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(time.time_ns() % 2**31)
    bed = Bed()
    checker = Checker(bed)
    checker.packing()
    print("packing checked", flush=True)
    if bed.facts.capability == 90:
        checker.every_gate()
        checker.every_kind(SMALL_SHAPES if args.quick else MANY_SHAPES)
        print("epilogues checked", flush=True)
    for dtype in TORCH:
        for n, k in SHAPES:
            if (args.quick and n * k > 10**6) or (dtype == "f16" and n * k > 5 * 10**6):
                continue
            started = time.perf_counter()
            checker.shape(n, k, dtype, TOKENS)
            torch.cuda.empty_cache()
            print(
                f"{dtype} {n} x {k}: segments {gemm.segments_of(n, k)}, "
                f"{time.perf_counter() - started:.1f} s",
                flush=True,
            )
    print(
        f"{bed.facts.name}: {checker.launches} launches checked, {len(checker.failures)} failures, "
        f"largest relative error {checker.worst:.1e}, built in {bed.build_seconds:.1f} s "
        f"({bed.compile_seconds:.1f} s of compiling)"
    )
    sys.exit(bool(checker.failures))


if __name__ == "__main__":
    main()
