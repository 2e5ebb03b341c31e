"""exp, tanh, erf and the activations, for a float32 or a vector of them."""

from __future__ import annotations

import math
from collections.abc import Callable

from llvmlite import ir

from rvllm.backends.cpu.compiled.codegen.emit import Kernel, Value
from rvllm.backends.cpu.reference.ops import ERF_OVER, ERF_UNDER
from rvllm.program.ops.dense import Activation

LOG2E = 1.0 / math.log(2.0)
LN2_HIGH, LN2_LOW = 0.693145751953125, 1.428606820309417e-06  # ln 2 in two parts, the first short of bits
LOWEST, HIGHEST = -87.33654, 88.02  # where exp leaves the normal float32 numbers


def exp(k: Kernel, x: Value) -> Value:
    """e^x within 2 units in the last place; 0 below -87.3, at most e^88.

    x = n ln 2 + r with |r| <= ln 2 / 2; e^r by its Taylor series, 2^n through the exponent's bits.
    """
    clipped = k.least(k.most(x, _number(k, x, LOWEST)), _number(k, x, HIGHEST))
    shifted = clipped * _number(k, x, LOG2E)
    half = k.select(shifted < 0.0, _number(k, x, -0.5), _number(k, x, 0.5))
    n = k.to_int(shifted + half)
    count = k.to_float(n)
    r = k.fma(count, _number(k, x, -LN2_LOW), k.fma(count, _number(k, x, -LN2_HIGH), clipped))
    series = _number(k, x, 1.0 / math.factorial(7))
    for power in range(6, -1, -1):
        series = k.fma(series, r, _number(k, x, 1.0 / math.factorial(power)))
    scale = k.bits((n + 127) << 23, x.type)
    return k.select(x < LOWEST, _number(k, x, 0.0), series * scale)


def _number(k: Kernel, like: Value, number: float) -> Value:
    return k.vf(number) if isinstance(like.type, ir.VectorType) else k.f(number)


def tanh(k: Kernel, x: Value) -> Value:
    """1 - 2 / (e^2x + 1), and x - x^3 / 3 + 2 x^5 / 15 near 0, where that loses digits."""
    wide = _number(k, x, 1.0) - _number(k, x, 2.0) / (exp(k, x * _number(k, x, 2.0)) + _number(k, x, 1.0))
    square = x * x
    series = k.fma(square, _number(k, x, -17.0 / 315.0), _number(k, x, 2.0 / 15.0))
    series = k.fma(square, series, _number(k, x, -1.0 / 3.0))
    near = k.fma(x * square, series, x)
    return k.select(square < _number(k, x, 0.04), near, wide)


def erf(k: Kernel, x: Value) -> Value:
    """See backends/cpu/ops.erf."""
    x = k.least(k.most(x, _number(k, x, -4.0)), _number(k, x, 4.0))
    square = x * x

    def polynomial(coefficients: tuple[float, ...]) -> Value:
        out = _number(k, x, coefficients[0])
        for c in coefficients[1:]:
            out = k.fma(out, square, _number(k, x, c))
        return out

    out = x * polynomial(ERF_OVER) / polynomial(ERF_UNDER)
    return k.least(k.most(out, _number(k, x, -1.0)), _number(k, x, 1.0))


def silu(k: Kernel, x: Value) -> Value:
    """x / (1 + e^-x)."""
    return x / (exp(k, _number(k, x, 0.0) - x) + _number(k, x, 1.0))


def gelu(k: Kernel, x: Value) -> Value:
    """x (1 + erf(x / sqrt 2)) / 2."""
    return x * _number(k, x, 0.5) * (erf(k, x * _number(k, x, 0.5**0.5)) + _number(k, x, 1.0))


def gelu_tanh(k: Kernel, x: Value) -> Value:
    """gelu's approximation."""
    inner = (x + x * x * x * _number(k, x, 0.044715)) * _number(k, x, math.sqrt(2 / math.pi))
    return x * _number(k, x, 0.5) * (tanh(k, inner) + _number(k, x, 1.0))


def relu(k: Kernel, x: Value) -> Value:
    """max(x, 0)."""
    return k.most(x, _number(k, x, 0.0))


def relu2(k: Kernel, x: Value) -> Value:
    """max(x, 0)^2."""
    positive = relu(k, x)
    return positive * positive


ACTIVATIONS: dict[Activation, Callable[[Kernel, Value], Value]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": relu,
    "relu2": relu2,
}
