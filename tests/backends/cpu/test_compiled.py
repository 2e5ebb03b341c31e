"""The compiled kernels: each stored type against its dequantised rows, models against the NumPy kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rvllm.backends.cpu.backend import CpuBackend
from rvllm.backends.cpu.compiled import library as compiled
from rvllm.backends.cpu.compiled.formats import FORMATS, LANES, Matrix, Segment, aligned, segment
from rvllm.backends.cpu.compiled.lower import expert_pieces
from rvllm.backends.cpu.compiled.model import chosen
from rvllm.backends.cpu.compiled.slots import BLOCK_ROWS, IDS, TOKENS
from rvllm.backends.cpu.compiled.step import chunks_of
from rvllm.backends.cpu.reference import ops
from rvllm.config import EngineConfig
from rvllm.errors import UsageError
from rvllm.models.config import ModelConfig
from rvllm.models.registry import build_program
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Weight
from rvllm.weights.checkpoint import TensorType
from rvllm.weights.gguf.blocks import dequantise
from rvllm.weights.open import open_checkpoint
from support.models import tiny

ROOT = Path(__file__).parents[3]

if absent := compiled.missing():
    pytest.skip(f"no compiled kernels: {absent}", allow_module_level=True)


def loaded(path: Path, **settings: Any) -> CpuBackend:
    """The model at `path` on the CPU."""
    checkpoint = open_checkpoint(path)
    program = build_program(ModelConfig(checkpoint.config, checkpoint.config_origin), DType.F32)
    shared = {"device": "cpu", "num_blocks": 64, "max_num_seqs": 4, "threads": 2}
    return CpuBackend.load(program, checkpoint, EngineConfig(**{**shared, **settings}))


def runnable() -> list[compiled.Processor]:
    """The kinds of processor whose libraries this machine can run: its own, and a lower level of it."""
    kind = compiled.processor()
    lower = [compiled.Processor.X86_64_V3] if kind is compiled.Processor.X86_64_V4 else []
    return [*([kind] if kind else []), *lower]


@pytest.fixture(scope="module", params=runnable(), ids=lambda kind: kind.value)
def library(request: pytest.FixtureRequest) -> compiled.Library:
    return compiled.Library(compiled.PREBUILT / f"{request.param.value}.so")


def address(array: np.ndarray) -> int:
    return array.ctypes.data


def stored(kind: TensorType, rows: int, inner: int) -> np.ndarray:
    """Random bytes of a tensor."""
    from support.weights.random_blocks import random_blocks

    numbers = np.random.default_rng(rows).standard_normal((rows, inner)).astype(np.float32)
    if kind.block[0] > 1:
        return random_blocks(kind, rows, inner, rows).reshape(-1)
    if kind is TensorType.BF16:
        return (numbers.view(np.uint32) >> 16).astype(np.uint16).reshape(-1).view(np.uint8)
    return numbers.astype(np.float16 if kind is TensorType.F16 else np.float32).reshape(-1).view(np.uint8)


def product(library: compiled.Library, weight: Segment, x: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """x @ weight.T + bias on one thread; what is not written stays nan."""
    rows, inner = x.shape
    out = np.full((rows, weight.rows + 3), np.nan, dtype=np.float32)
    chunks, line = np.array(chunks_of(rows)), np.zeros(8, dtype=np.int64)
    piece, order = np.array([address(weight.data), weight.rows, 0]), np.arange(rows)
    room = inner * LANES * 4 + BLOCK_ROWS * (inner // 32 + 1) * 4
    scratch, added = aligned(room), np.zeros(weight.tiles * LANES, dtype=np.float32)
    scratch[:] = 255  # nan
    added[: weight.rows] = bias
    slots = np.array(
        [
            address(chunks), address(x), inner, address(out), out.shape[1], address(piece), weight.tiles,
            inner, address(added), address(order), address(order), address(scratch), room, address(line),
        ]
    )  # fmt: skip
    library.function(f"product_{weight.format.name}")(address(slots), 0, 1)
    assert np.isnan(out[:, weight.rows :]).all()
    return out[:, : weight.rows]


@pytest.mark.parametrize("kind", FORMATS, ids=lambda k: k.value)
@pytest.mark.parametrize(("rows", "inner"), [(48, 256), (37, 512), (5, 1024)])
def test_products_equal_the_dequantised(
    kind: TensorType, rows: int, inner: int, library: compiled.Library
) -> None:
    raw = stored(kind, rows, inner)
    weight = segment(kind, 0, inner, raw)
    source = np.random.default_rng(inner)
    x = source.standard_normal((277, inner), dtype=np.float32)
    bias = source.standard_normal(rows, dtype=np.float32)
    expected = x.astype(np.float64) @ dequantise(kind, raw, (rows, inner)).astype(np.float64).T + bias
    whole = product(library, weight, x, bias)
    np.testing.assert_allclose(whole, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    some = ((0, 0), (0, 1), (276, 1), (3, 2), (8, 3), (124, 7), (1, 8), (6, 23), (9, 25), (50, 129))
    for first, count in some:
        part = product(library, weight, x[first : first + count].copy(), bias)
        assert np.array_equal(part, whole[first : first + count])


@pytest.mark.parametrize("kind", FORMATS, ids=lambda k: k.value)
def test_every_processor_gives_the_same_bits(kind: TensorType) -> None:
    raw, x = stored(kind, 37, 512), np.random.default_rng(5).standard_normal((9, 512), dtype=np.float32)
    weight, none = segment(kind, 0, 512, raw), np.zeros(37, dtype=np.float32)
    libraries = [compiled.Library(compiled.PREBUILT / f"{kind.value}.so") for kind in runnable()]
    first, *others = [product(library, weight, x, none) for library in libraries]
    assert all(np.array_equal(first, other) for other in others)


@pytest.mark.parametrize("kind", [TensorType.F32, TensorType.F16, TensorType.BF16], ids=lambda k: k.value)
@pytest.mark.parametrize("inner", [1, 7, 33, 45])
def test_plain_rows_of_any_length(kind: TensorType, inner: int, library: compiled.Library) -> None:
    raw = stored(kind, 19, inner)
    x = np.random.default_rng(0).standard_normal((11, inner), dtype=np.float32)
    weight, none = segment(kind, 0, inner, raw), np.zeros(19, dtype=np.float32)
    whole = product(library, weight, x, none)
    np.testing.assert_allclose(whole, x @ dequantise(kind, raw, (19, inner)).T, rtol=0, atol=1e-5)
    assert np.array_equal(product(library, weight, x[4:5].copy(), none), whole[4:5])


@pytest.mark.parametrize("kind", FORMATS, ids=lambda k: k.value)
def test_embeddings_have_the_bits_of_the_dequantised(kind: TensorType, library: compiled.Library) -> None:
    raw = stored(kind, 40, 256)
    table = segment(kind, 0, 256, raw)
    ids = np.array([0, 39, 17, 16, 15, 17], dtype=np.int32)
    out, line = np.full((6, 256), np.nan, dtype=np.float32), np.zeros(8, dtype=np.int64)
    step = np.zeros(16, dtype=np.int64)
    step[TOKENS], step[IDS] = len(ids), address(ids)
    scale = int(np.array([1.0, 0.0], dtype=np.float32).view(np.int64)[0])
    slots = np.array(
        [address(step), address(table.data), table.data.shape[1], 256, address(out), scale, address(line)]
    )
    library.function(f"embed_{table.format.name}")(address(slots), 0, 1)
    assert np.array_equal(out, dequantise(kind, raw, (40, 256))[ids])


@pytest.mark.parametrize("name", ops.ACTIVATIONS)
def test_activations(name: str, library: compiled.Library) -> None:
    x = np.concatenate([np.linspace(-20, 20, 4001), np.linspace(-0.3, 0.3, 203), [-200.0, 0.0, 60.0]])
    x = x.astype(np.float32)
    out, rows, line = np.empty_like(x), np.array([1]), np.zeros(1, np.int64)
    slots = np.array([address(rows), address(x), len(x), address(out), len(x), address(line)])
    library.function(name)(address(slots), 0, 1)
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(out, ops.ACTIVATIONS[name](x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", tiny.CASES)
def test_tiny_models_equal_the_numpy_kernels(name: str) -> None:
    config = tiny.CASES[name]
    prompt = tiny.prompt_of(config)
    expected = tiny.logits_of(tiny.load(config, cpu_kernels="numpy"), prompt)
    backend = tiny.load(config, cpu_kernels="compiled")
    whole = tiny.logits_of(backend, prompt)
    np.testing.assert_allclose(whole, expected, rtol=0, atol=3e-5)
    for chunks in ([1] * len(prompt), [5, 16, 1, 26], [33, 15]):
        assert np.array_equal(tiny.logits_of(backend, prompt, chunks, slot=1), whole)


@pytest.mark.parametrize(
    "name", ["gemma2", "gemma3", "cohere", "cohere_qk_norm", "gpt_neox", "stablelm_parallel"]
)
def test_other_architectures_equal_the_numpy_kernels(name: str, tmp_path: Path) -> None:
    from support.models import archs_tiny

    config = archs_tiny.CASES[name].config
    path = archs_tiny.save(tmp_path, config, archs_tiny.random_tensors(name, config))
    prompt = archs_tiny.prompt_of(name)
    found = [
        tiny.logits_of(loaded(path, cpu_kernels=kernels, threads=n), prompt)
        for kernels, n in (("numpy", 2), ("compiled", 1), ("compiled", 3))
    ]
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=1e-4)
    assert np.array_equal(found[1], found[2])


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3", "deepseek_v3_halves"])
def test_mixtures_equal_the_numpy_kernels(name: str, tmp_path: Path) -> None:
    """By softmax or sigmoid, with groups by their best or two best, experts of all tokens, and latents."""
    from support.models import archs_moe_tiny, archs_tiny

    width = "intermediate_size" if name == "mixtral" else "moe_intermediate_size"
    config = archs_moe_tiny.CASES[name].config | {width: 32, "hidden_size": 48}
    if "kv_lora_rank" in config:
        config |= {"kv_lora_rank": 32, "v_head_dim": 16}
    path = archs_tiny.save(tmp_path, config, archs_tiny.random_tensors(name, config))
    prompt = archs_tiny.prompt_of(name, 60)
    plain, one, three = (
        loaded(path, cpu_kernels=kernels, threads=n, max_num_batched_tokens=64)
        for kernels, n in (("numpy", 2), ("compiled", 1), ("compiled", 3))
    )
    assert {op.kind for op in one._model.program.ops if op.name not in one._native.compiled} == {"sample"}
    whole = tiny.logits_of(one, prompt)
    np.testing.assert_allclose(whole, tiny.logits_of(plain, prompt), rtol=0, atol=1e-4)
    for chunks in ([1] * 5 + [55], [29, 31]):
        assert np.array_equal(tiny.logits_of(three, prompt, chunks), whole)


MIXED = (TensorType.Q4_K, TensorType.Q6_K)


@pytest.mark.parametrize(
    "kinds", [MIXED, (TensorType.Q8_0, TensorType.Q5_0)], ids=["two formats", "one format"]
)
@pytest.mark.parametrize("tokens", [1, 9, 70])
def test_rows_of_experts_meet_their_own_matrices(
    kinds: tuple[TensorType, TensorType], tokens: int, library: compiled.Library
) -> None:
    """Experts whose gates and ups are stored in different types, few and many rows, and none."""
    experts, width, inner, chosen = 4, 32, 256, 2
    parts = [(kind, stored(kind, width, inner)) for _ in range(experts) for kind in kinds]
    matrix = Matrix(tuple(segment(k, i * width, inner, raw) for i, (k, raw) in enumerate(parts)))
    rows = np.concatenate([dequantise(kind, raw, (width, inner)) for kind, raw in parts])
    source = np.random.default_rng(tokens)
    x = source.standard_normal((tokens, inner), dtype=np.float32)
    ids = np.stack([source.choice([0, 1, 3], chosen, replace=False) for _ in range(tokens)]).astype(np.int32)
    out = np.full((tokens * chosen, 2 * width), np.nan, dtype=np.float32)
    count, places, bias = np.array([tokens]), np.zeros(experts, np.int64), np.zeros(2 * width, np.float32)
    sources, targets = np.zeros((2, tokens * chosen), np.int64)
    chunks, room = np.zeros(2 + 3 * tokens * chosen, np.int64), inner * LANES * 4 + BLOCK_ROWS * 8 * 4
    scratch = aligned(room)

    def call(name: str, *arguments: np.ndarray | int) -> None:
        line = np.zeros(8, dtype=np.int64)
        slots = np.array([a if isinstance(a, int) else address(a) for a in (*arguments, line)])
        library.function(name)(address(slots), 0, 1)

    call("assign", count, ids, chosen, experts, places, sources, targets, chunks)
    stack = Weight("up", (experts, 2 * width, inner), (), "stack")
    for form, pieces in expert_pieces(matrix, stack):
        maps = (sources, targets, scratch, room)
        tiles = 2 * width // LANES
        call(f"product_{form.name}", chunks, x, inner, out, 2 * width, pieces, tiles, inner, bias, *maps)
    wanted = rows.reshape(experts, 2 * width, inner)[ids.reshape(-1)] @ np.repeat(x, chosen, 0)[:, :, None]
    np.testing.assert_allclose(out, wanted[:, :, 0], rtol=0, atol=3e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v2", "nemotron_h"])
def test_ops_left_to_numpy_share_the_workspace(name: str, tmp_path: Path) -> None:
    """Experts and heads of odd widths and recurrent layers run between lists of compiled kernels."""
    from support.models import archs_moe_tiny, archs_tiny, nemotron_tiny

    config = (archs_moe_tiny.CASES | nemotron_tiny.CASES)[name].config
    path = archs_tiny.save(tmp_path, config, archs_tiny.random_tensors(name, config))
    prompt, found = archs_tiny.prompt_of(name, 60), []
    for kernels in ("numpy", "compiled"):
        backend = loaded(path, cpu_kernels=kernels, max_num_batched_tokens=64)
        found.append(tiny.logits_of(backend, prompt, [41, 19]))
        assert not np.array_equal(found[-1][0], found[-1][40])
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=1e-4)


def test_no_step_takes_memory_of_its_own() -> None:
    """The workspace is as large as the largest step from the start, and buffers share it."""
    config = tiny.CASES["llama"] | {"num_hidden_layers": 8}
    backend = tiny.load(config, cpu_kernels="compiled", max_num_batched_tokens=48, max_num_seqs=4)
    assert backend._native is not None
    step = backend._native._step
    before, apart = step.memory, sum(b.nbytes for b in step.buffers.values())
    tiny.logits_of(backend, tiny.prompt_of(config, 48), [1, 47])
    wide = tiny.logits_of(backend, tiny.prompt_of(config, 4), slot=1)
    assert step.memory is before and len(wide) == 4
    assert before.nbytes < apart / 3


def test_a_step_larger_than_foreseen_is_computed() -> None:
    config = tiny.CASES["llama"]
    prompt = tiny.prompt_of(config)
    few, many = (tiny.load(config, cpu_kernels="compiled", max_num_batched_tokens=n) for n in (16, 48))
    assert np.array_equal(tiny.logits_of(few, prompt), tiny.logits_of(many, prompt))


def test_a_broken_neighbour_reaches_nobody() -> None:
    config = tiny.CASES["qwen2_layer_types"]
    backend, prompt = tiny.load(config, cpu_kernels="compiled"), tiny.prompt_of(config)
    alone = tiny.logits_of(backend, prompt)
    for keys, values in backend._model.caches.values():
        keys[:-1], values[:-1] = np.nan, np.nan
    assert np.array_equal(tiny.logits_of(backend, prompt), alone)


def test_what_is_asked_for_and_absent_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen("compiled") and chosen("auto") and not chosen("numpy")
    assert compiled.in_use("auto").startswith("compiled for ") and "asks" in compiled.in_use("numpy")
    monkeypatch.setattr(compiled, "processor", lambda: None)
    assert not chosen("auto") and "none for this processor" in compiled.in_use("auto")
    with pytest.raises(
        UsageError, match=r"none for this processor .*, only for x86-64-v4, x86-64-v3, aarch64"
    ):
        chosen("compiled")


def test_a_copy_that_was_not_built_says_how(tmp_path: Path) -> None:
    assert "build_cpu_kernels.py" in (compiled.missing(tmp_path) or "")


def test_a_damaged_library_is_refused(tmp_path: Path) -> None:
    kind = compiled.processor()
    assert kind is not None
    for path in compiled.PREBUILT.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    library = tmp_path / f"{kind.value}.so"
    content = bytearray(library.read_bytes())
    content[len(content) // 2] ^= 255
    library.write_bytes(bytes(content))
    with pytest.raises(OSError, match="is not what was built"):
        compiled.load(tmp_path)


@pytest.mark.parametrize("kind", compiled.Processor)
def test_every_processor_has_every_kernel(kind: compiled.Processor) -> None:
    """The libraries of other processors cannot be loaded here; their symbols can be read."""
    pytest.importorskip("llvmlite", reason="needs the extra cpu-build")
    from rvllm.backends.cpu.compiled.codegen.build import kernels

    names = (compiled.PREBUILT / f"{kind.value}.so").read_bytes()
    assert all(b"\0" + name.encode() + b"\0" in names for name in kernels(kind))


def test_vectors_are_registers() -> None:
    """The inner loop multiplies whole vectors from memory, with no call and no scalar step."""
    pytest.importorskip("llvmlite", reason="needs the extra cpu-build")
    from rvllm.backends.cpu.compiled.codegen import build, rowwise

    for kind, word in ((compiled.Processor.X86_64_V4, "zmm"), (compiled.Processor.X86_64_V3, "ymm")):
        machine = build.machine_of(kind)
        text = machine.emit_assembly(build.optimised({"add": rowwise.add()}, machine))
        assert "call" not in text and word in text


@pytest.mark.parametrize("name", ["gemma2", "mixtral", "nemotron_h"])
def test_the_plan_tells_what_the_weights_take(name: str, tmp_path: Path) -> None:
    """Gemma adds a constant to its norms, experts of odd widths are NumPy's, ties are held once."""
    from support.models import archs_moe_tiny, archs_tiny, nemotron_tiny

    config = (archs_tiny.CASES | archs_moe_tiny.CASES | nemotron_tiny.CASES)[name].config
    path = archs_tiny.save(tmp_path, config, archs_tiny.random_tensors(name, config))
    for kernels in ("compiled", "numpy"):
        backend = loaded(path, cpu_kernels=kernels)
        lines = {line.name: line.nbytes for line in backend.ledger()}
        assert lines["weights"] == sum(w.nbytes for w in backend._model.weights.values()) > 0
        packed = 0 if backend._native is None else sum(backend._native.stored.values())
        assert lines.get("packed weights, compiled kernels", 0) == packed


@pytest.mark.models
def test_the_plan_counts_gguf_blocks_as_packed() -> None:
    from rvllm.backends.cpu.compiled.model import weight_lines
    from support.models.fetched import model_path

    checkpoint = open_checkpoint(model_path("smollm2-135m"))
    program = build_program(ModelConfig(checkpoint.config, checkpoint.config_origin), DType.F32)
    config = EngineConfig(device="cpu", cpu_kernels="compiled", num_blocks=8, threads=1)
    planned = sum(line.nbytes for line in weight_lines(program, checkpoint, config))
    stored = sum(info.nbytes for info in checkpoint.tensors.values())
    elements = sum(w.elements for w in program.weights)
    assert stored <= planned < 1.1 * stored < 4 * elements / 4
    backend = CpuBackend.load(program, checkpoint, config)
    held = sum(w.nbytes for w in backend._model.weights.values()) + sum(backend._native.stored.values())
    assert planned == held
