"""The reference functions against formulas in float64, and Norm's slices and groups."""

import math

import numpy as np
import pytest

from rvllm.backends.cpu.reference import interpreter as interpret
from rvllm.backends.cpu.reference import ops
from rvllm.backends.cpu.reference.run import Model, Run
from rvllm.backends.cpu.step import flat_step
from rvllm.backends.cpu.threads import Workers
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Buffer, Norm, Part, Program, Weight

X = np.random.default_rng(0).standard_normal((7, 24)).astype(np.float32) * 3


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("silu", lambda x: x / (1 + math.exp(-x))),
        ("gelu", lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2)))),
        ("gelu_tanh", lambda x: x * 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
        ("relu", lambda x: max(x, 0.0)),
        ("relu2", lambda x: max(x, 0.0) ** 2),
    ],
)
def test_activations(name: str, formula: object) -> None:
    expected = np.vectorize(formula)(X.astype(np.float64))
    np.testing.assert_allclose(ops.activate(X, name), expected, atol=3e-6)
    gated = ops.gated_activation(np.concatenate([X, X * 2], axis=1), name)
    np.testing.assert_allclose(gated, expected * X * 2, atol=3e-5)


def test_erf_over_its_whole_range() -> None:
    x = np.linspace(-6, 6, 4001, dtype=np.float32)
    assert np.abs(ops.erf(x) - np.vectorize(math.erf)(x.astype(np.float64))).max() < 5e-7


def test_norms() -> None:
    x, w, b = X.astype(np.float64), np.linspace(0.5, 2, 24), np.linspace(-1, 1, 24)
    rms = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-3) * w
    np.testing.assert_allclose(ops.rms_norm(X, w.astype(np.float32), 1e-3), rms, atol=1e-5)
    layer = (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + 1e-3) * w + b
    ours = ops.layer_norm(X, w.astype(np.float32), b.astype(np.float32), 1e-3)
    np.testing.assert_allclose(ours, layer, atol=1e-5)


def test_rotations_pair_halves_or_neighbours() -> None:
    x = X[:, :20].reshape(7, 2, 10)
    angle = np.random.default_rng(1).uniform(0, 6, (7, 4))
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    turned = (x[..., :4] + 1j * x[..., 4:8]) * np.exp(1j * angle)[:, None]
    halves = ops.rotate(x, cos, sin)
    np.testing.assert_allclose(halves[..., :4], turned.real, atol=1e-5)
    np.testing.assert_allclose(halves[..., 4:8], turned.imag, atol=1e-5)
    assert np.array_equal(halves[..., 8:], x[..., 8:])  # beyond the rotated part
    turned = (x[..., 0:8:2] + 1j * x[..., 1:8:2]) * np.exp(1j * angle)[:, None]
    neighbours = ops.rotate(x, cos, sin, interleaved=True)
    np.testing.assert_allclose(neighbours[..., 0:8:2], turned.real, atol=1e-5)
    np.testing.assert_allclose(neighbours[..., 1:8:2], turned.imag, atol=1e-5)


def test_soft_cap_and_logits() -> None:
    w = X[:5]
    out = ops.logits(X, w, np.ones(5, np.float32), 0.5, 3.0)
    np.testing.assert_allclose(out, 3 * np.tanh((X @ w.T * 0.5 + 1) / 3), atol=1e-5)


@pytest.mark.parametrize(("each", "kind"), [(False, "rms"), (True, "rms"), (True, "layer")])
def test_norm_of_groups_inside_a_row(each: bool, kind: str) -> None:
    """Columns 8 .. 19 in groups of 4, in place, with one weight for all groups or one each."""
    weight = np.linspace(0.5, 2, 12 if each else 4).astype(np.float32)
    buffer = Buffer("x", "tokens", 24, DType.F32)
    declared = Weight("w", weight.shape, (Part("w", weight.shape),), "vector")
    op = Norm(
        name="n", x=buffer, out=buffer, weight=declared, kind_=kind, eps=1e-5, group=4, start=8, width=12
    )
    program = Program("t", DType.F32, 1, 1, (op,), (buffer,), (declared,), ())
    model = Model(program, {"w": weight}, {}, {}, Workers(1))
    one = np.ones(1, np.int32)
    step = flat_step(one, one, one * 0, np.zeros((1, 8), np.int32), np.zeros(0, np.int64))
    run = Run(model, step, {"x": X.copy()})
    interpret.norm(op, run)
    expected = X.copy()
    for g in range(3):
        part = slice(8 + 4 * g, 12 + 4 * g)
        w = weight[4 * g : 4 * g + 4] if each else weight
        rows = X[:, part]
        expected[:, part] = (
            ops.rms_norm(rows, w, 1e-5) if kind == "rms" else ops.layer_norm(rows, w, None, 1e-5)
        )
    np.testing.assert_allclose(run.buffers["x"], expected, atol=1e-6)
