"""Decode paths of one token: their kernel has the bits of the others, models draw the same tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rvllm.backends.cuda.device.launches import Counts
from rvllm.backends.cuda.formats.choose import kept
from rvllm.backends.cuda.ops.decode import chains
from rvllm.backends.cuda.ops.decode.chains import Steps
from rvllm.backends.cuda.ops.decode.one import PLACES
from rvllm.backends.cuda.ops.decode.races import faults
from rvllm.backends.cuda.ops.decode.step import Mixture, NormFront, Step, Type
from rvllm.backends.cuda.ops.gemm.common import Kind
from rvllm.backends.cuda.profile import cost_of
from rvllm.backends.cuda.step_planner import StepPlanner
from rvllm.backends.cuda.supported import check_supported
from rvllm.config import EngineConfig
from rvllm.engine.ipc.messages import Sampling
from rvllm.errors import UsageError
from rvllm.kernels.decode.specs import MAX_NORM_WIDTH
from rvllm.models.config import ModelConfig
from rvllm.models.registry import build_program
from rvllm.program.cost import Cost
from rvllm.program.dtypes import DType
from support.emulator import EMULATED, Emulator, needs_emulator
from support.emulator.driver import ATTRIBUTES, emulated_driver
from support.kernels import gemv_checks
from support.kernels.gpu_engine import CONFIG, backend, core_of, model, needs_gpu, run
from support.kernels.harness import BF16, F16, Gpu
from support.kernels.planned import GB120, H200, declared, kinds
from support.models.real_configs import CONFIGS, on_one_card


class TestKernel:
    pytestmark = EMULATED

    @pytest.mark.parametrize(
        ("n", "k", "kind"),
        [
            (203, 72, Kind.STORE),
            (64, 8, Kind.STORE),
            (144, 1160, Kind.STORE),
            (160, 328, Kind.GATED_SILU),
            (515, 192, Kind.LOGITS),
        ],
    )
    def test_a_product_has_the_bits_of_many_tokens(
        self, emulator: Emulator, n: int, k: int, kind: Kind
    ) -> None:
        gemv_checks.check_alone(emulator, np.random.default_rng(n), BF16 if n % 2 else F16, n, k, kind)

    @pytest.mark.parametrize(("k", "kind"), [(192, "rms"), (2056, "rms"), (648, "layer")])
    def test_a_norm_in_front(self, emulator: Emulator, k: int, kind: str) -> None:
        gemv_checks.check_norm(emulator, np.random.default_rng(k), BF16, k, kind)

    def test_products_behind_one_another(self, emulator: Emulator) -> None:
        gemv_checks.check_chain(emulator, np.random.default_rng(3), BF16, 1, 192, 328)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    ("n", "k", "kind", "norm"),
    [
        (2048, 2048, Kind.STORE, ""),  # eight segments
        (3072, 2048, Kind.STORE, "rms"),  # five, which are not equally long
        (6144, 2048, Kind.STORE, "layer"),
        (2560, 10240, Kind.STORE, ""),
        (4608, 3584, Kind.STORE, "rms"),
        (1000, 328, Kind.STORE, "layer"),
        (11264, 2048, Kind.GATED_SILU, "layer"),  # one segment
        (37888, 3584, Kind.GATED_SILU, "rms"),
        (20480, 2560, Kind.GATED_GELU_TANH, ""),
    ],
)
def test_one_token_has_launches_of_its_own(n: int, k: int, kind: Kind, norm: str) -> None:
    machine = Gpu()
    if machine.facts.capability != 90:
        pytest.skip("of Hopper alone")
    for dtype in (BF16, F16):
        gemv_checks.check_one_token(machine, np.random.default_rng(n + k), dtype, n, k, kind, norm)
    machine.clear()


def planned(config: dict[str, Any], **flags: Any) -> StepPlanner:
    """The plan of a model on an H200."""
    program = build_program(ModelConfig(config, "tiny"), DType.BF16)
    engine = EngineConfig(device="cuda", num_gpu_blocks=64, max_model_len=512, **flags)
    check_supported(program, engine)
    return StepPlanner.plan(program, engine, H200, GB120)[0]


QWEN2 = model(
    "Qwen2ForCausalLM", num_hidden_layers=2, hidden_size=128, intermediate_size=200, num_attention_heads=2
)
PARALLEL = model(
    "StableLmForCausalLM", num_hidden_layers=2, hidden_size=128, intermediate_size=200, num_attention_heads=2,
    use_parallel_residual=True, partial_rotary_factor=0.25, layer_norm_eps=1e-5,
)  # fmt: skip
MIXTURE = model(
    "Qwen3MoeForCausalLM", num_hidden_layers=2, hidden_size=128, moe_intermediate_size=72, num_experts=32,
    num_experts_per_tok=3, norm_topk_prob=True, num_attention_heads=2, decoder_sparse_step=1,
    mlp_only_layers=[],
)  # fmt: skip


@pytest.mark.parametrize(
    "config", [QWEN2, PARALLEL, MIXTURE], ids=lambda config: str(config["architectures"][0])
)
class TestModels:
    """The same tokens with the same log-probabilities, bit for bit, by every path."""

    @pytest.mark.emulated
    @needs_emulator
    def test_emulated(self, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(ATTRIBUTES, "MULTIPROCESSOR_COUNT", 1)  # blocks run one after another
        with emulated_driver():
            self.check(config, 3)

    @pytest.mark.gpu
    @needs_gpu
    def test_on_a_gpu(self, config: dict[str, Any]) -> None:
        self.check(config, 40)

    def check(self, config: dict[str, Any], count: int) -> None:
        asked = [([5, 4, 300, 2, 11], Sampling(max_tokens=count, logprobs=2))]
        found, chains = {}, {}
        for path in ("batched", "gemv", "fused", "persistent"):
            engine = replace(CONFIG, decode_path=path, max_num_seqs=2, max_num_batched_tokens=16)
            loaded = backend(config, "cuda", DType.BF16, engine)
            core = core_of(loaded, config, engine)
            (outputs,) = run(core, asked)
            chains[path] = sum(k.count for k in loaded.last_kernels() if "_chain" in k.kernel)
            core.close()
            found[path] = [output.logprobs for output in outputs]
        assert len(found["batched"]) == count
        assert found["gemv"] == found["fused"] == found["persistent"] == found["batched"]
        assert chains["batched"] == 0 < chains["persistent"] < chains["gemv"]


class TestPlans:
    @pytest.mark.parametrize(
        ("name", "launches"),
        [
            ("Qwen2.5-7B", {"batched": 203, "gemv": 203, "fused": 146, "persistent": 62}),
            ("Qwen3-30B-A3B", {"batched": 343, "gemv": 391, "fused": 389, "persistent": 151}),
        ],
    )
    def test_launches_of_a_step(self, name: str, launches: dict[str, int]) -> None:
        planner = planned(CONFIGS[name])
        assert {path: len(replace(planner, path=path).decode(1)) for path in launches} == launches
        many = replace(planner, path="persistent").decode(2)
        assert [p.kernel for p in many] == [p.kernel for p in planner.decode(2)]

    @pytest.mark.parametrize(
        "name", [n for n in CONFIGS if "BERT" not in n and "E5" not in n and "MiniLM" not in n]
    )
    def test_every_model_has_chains_without_faults(self, name: str) -> None:
        planner = planned(on_one_card(name)[1])
        for path in ("gemv", "fused", "persistent"):
            steps = [p.does.steps for p in replace(planner, path=path).decode(1) if isinstance(p.does, Steps)]
            assert steps and not [fault for chain in steps for fault in faults(chain, 132, 132)]

    @pytest.mark.parametrize(
        ("name", "layers", "each", "rotations"),
        [
            ("StableLM-2-1.6B", 24, 5, 0),
            ("SmolLM3-3B", 36, 5, 9),
            ("Gemma-3-4B", 34, 7, 0),
            ("Qwen3-30B-A3B", 48, 7, 48),
        ],
    )
    def test_one_token_on_hopper(self, name: str, layers: int, each: int, rotations: int) -> None:
        """Products are launches of their own, whose blocks all have room at once; attention rotates."""
        found = planned(CONFIGS[name]).decode(1)
        ones = [p for p in found if "one_token" in p.kernel]
        assert [p.op for p in found if "_gemm_" in p.kernel] == ["lm_head"]
        assert sum("rope_kv" in p.kernel for p in found) == rotations
        around = 6 if "Gemma" in name else 7  # begin, embed, gather, norm, head, sampling
        extra = rotations if name == "SmolLM3-3B" else 0
        assert len(found) == around + layers * each + extra
        assert kinds(ones[0]) == declared("decode/one_token_sm90.cu", "    one_token")
        for p in ones:
            x, y, z = p.grid(Counts(1, 1, 1))
            held = 2 if 2 * (p.smem + 1024) <= 233472 else 1
            assert x * y * z // p.cluster <= min(132, PLACES[p.cluster]) * held, p.op
        for p in found:
            if "_turn_" in p.kernel:
                assert kinds(p) == declared("attention/decode.cu", "attn_decode_turn")

    def test_models_that_were_not_timed_keep_their_products(self) -> None:
        for name in ("Qwen2.5-7B", "Mixtral-8x7B", "DeepSeek-V2-Lite"):
            assert not any("one_token" in p.kernel for p in planned(on_one_card(name)[1]).decode(1))

    def test_a_path_that_joins_nothing_is_refused_with_those_that_do(self) -> None:
        """Eight experts are fewer than a router's step takes, so nothing of Mixtral has a neighbour."""
        said = "--decode-path persistent does not exist for Mixtral.* there are batched, gemv, fused$"
        with pytest.raises(UsageError, match=said):
            planned(CONFIGS["Mixtral-8x7B"], decode_path="persistent")

    def test_fp8_keeps_weights_as_the_quantization_flag_does(self) -> None:
        program = build_program(ModelConfig(QWEN2, "tiny"), DType.BF16)
        by_path, by_flag = (
            kept(program, None, EngineConfig(device="cuda", **flags), H200)
            for flags in ({"decode_path": "fp8"}, {"quantization": "fp8"})
        )
        assert by_path == by_flag != kept(program, None, EngineConfig(device="cuda"), H200)

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ({"decode_path": "gemv", "gemm_strategy": "cublas"}, "--decode-path gemv computes on the native"),
            ({"decode_path": "fp8", "quantization": "none"}, "--decode-path fp8 and --quantization none"),
        ],
    )
    def test_contradictions_are_refused(self, flags: dict[str, str], message: str) -> None:
        with pytest.raises(UsageError, match=message):
            planned(QWEN2, **flags)


def test_a_joined_launch_costs_what_its_stages_do() -> None:
    costs = {"a": Cost(flops=1), "b + c": Cost(flops=10), "aa": Cost(flops=1000)}
    assert cost_of("b + c", costs).flops == 10
    assert cost_of("norm + a + b + c", costs).flops == 11
    assert cost_of("aa + d", costs).flops == 1000
    assert cost_of("d", costs) == Cost()


class TestFaults:
    """The static check finds what would hang or race."""

    NORM = NormFront(x=1000, weight=1, bias=0, normed=5000, width=64, eps=1e-5, layer=False)

    def step(self, **fields: Any) -> Step:
        return Step(
            **{"weights": 1 << 20, "x": 5000, "out": 9000, "rows": 64, "k": 64, "segments": 1, "pitch": 64}
            | fields
        )

    def test_a_product_does_the_norm_of_its_own_row_alone(self) -> None:
        """Of the same row, of the same width, and no wider than a block can hold."""
        assert chains._takes(self.step(), self.NORM)
        wide = MAX_NORM_WIDTH + 64
        for step, norm in (
            (self.step(x=4000), self.NORM),
            (self.step(k=128), self.NORM),
            (self.step(k=wide), replace(self.NORM, width=wide)),
            (self.step().normed(self.NORM), self.NORM),
        ):
            assert not chains._takes(step, norm)

    def test_nothing_is_wrong_with_a_product(self) -> None:
        assert not faults(
            [self.step(), self.step(x=9000, out=1000, residual=1000).normed(self.NORM)][:1], 132, 132
        )

    @pytest.mark.parametrize(
        ("fields", "norm", "grid", "said"),
        [
            ({}, False, 133, "133 blocks wait for each other on 132"),
            ({"out": 5100}, False, 132, "its result over its input"),
            ({"out": 1100, "residual": 1100}, True, 132, "its result over what is normalised"),
            ({"residual": 9064}, False, 132, "its result over its residual"),
            ({"out": 1 << 20}, False, 132, "its result over weights"),
            ({"type": Type.DOWN, "mixture": Mixture(4, 2, 0)}, False, 132, "DOWN without UP before it"),
        ],
    )
    def test_each_fault_is_named(self, fields: dict[str, Any], norm: bool, grid: int, said: str) -> None:
        step = self.step(**fields)
        before = self.step(out=20000)
        found = faults([before, step.normed(self.NORM) if norm else step], grid, 132)
        assert any(said in fault for fault in found), found
