"""A small language for kernels: Python writes LLVM IR with explicit vectors of 16 lanes.

A kernel is a function `void(int64 *args, int64 thread, int64 threads)`; its arguments are 8-byte slots.
Arithmetic is exactly what is written: no reassociation and no contraction, so the order of every sum is
the source's, on every machine and in every variant of a kernel. LLVM splits the 16 lanes for targets with
shorter registers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Concatenate, ParamSpec

import numpy as np
from llvmlite import ir

from rvllm.backends.cpu.compiled.slots import LANES

I8, I16, I32, I64 = (ir.IntType(n) for n in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
PTR = ir.PointerType()
P = ParamSpec("P")
Write = Callable[[Any, str], None]  # adds a kernel to a module, under a name


def lanes(element: Any) -> Any:
    """The vector type of 16 elements."""
    return ir.VectorType(element, LANES)


VF, VI = lanes(F32), lanes(I32)
Shape = Callable[[Any], Any]


def _one(element: Any) -> Any:
    return element


Operator = Callable[["Value", "Value | float"], "Value"]


def _binary(floating: str, integer: str) -> Operator:
    """An operator by the names of LLVM's instructions."""

    def apply(one: Value, other: Value | float) -> Value:
        make = getattr(one.kernel.builder, floating if one.is_float else integer)
        return Value(one.kernel, make(one.raw, one.raw_of(other)))

    return apply


def _compare(sign: str) -> Operator:
    def apply(one: Value, other: Value | float) -> Value:
        make = one.kernel.builder.fcmp_ordered if one.is_float else one.kernel.builder.icmp_signed
        return Value(one.kernel, make(sign, one.raw, one.raw_of(other)))

    return apply


class Value:
    """An SSA value; Python's operators emit instructions. Numbers are taken as constants of its type."""

    def __init__(self, kernel: Kernel, raw: Any) -> None:
        self.kernel = kernel
        self.raw = raw

    @property
    def type(self) -> Any:
        return self.raw.type

    @property
    def is_float(self) -> bool:
        """Whether it is a float or a vector of floats."""
        return isinstance(getattr(self.type, "element", self.type), (ir.FloatType, ir.HalfType))

    def raw_of(self, other: Value | float) -> Any:
        """The other side of an operator in LLVM's terms."""
        return other.raw if isinstance(other, Value) else self.kernel.const(self.type, other).raw

    __add__ = _binary("fadd", "add")
    __sub__ = _binary("fsub", "sub")
    __mul__ = _binary("fmul", "mul")
    __truediv__ = __floordiv__ = _binary("fdiv", "sdiv")
    __mod__ = _binary("frem", "srem")
    __and__, __or__ = _binary("and_", "and_"), _binary("or_", "or_")
    __rshift__, __lshift__ = _binary("lshr", "lshr"), _binary("shl", "shl")
    __lt__, __le__, __gt__, __ge__ = (_compare(sign) for sign in ("<", "<=", ">", ">="))
    equals = _compare("==")  # `==` stays Python's


class Var:
    """A variable of a kernel; LLVM keeps it in a register."""

    def __init__(self, kernel: Kernel, start: Value) -> None:
        self.kernel = kernel
        with kernel.builder.goto_entry_block():
            self.slot = kernel.builder.alloca(start.type)
        self.type = start.type
        self.set(start)

    def get(self) -> Value:
        return Value(self.kernel, self.kernel.builder.load(self.slot, typ=self.type))

    def set(self, value: Value) -> None:
        self.kernel.builder.store(value.raw, self.slot)


class Kernel:
    """One function being written."""

    def __init__(self, module: Any, name: str) -> None:
        self.module = module
        self.function = ir.Function(module, ir.FunctionType(ir.VoidType(), [PTR, I64, I64]), name)
        self.function.attributes.add("nounwind")
        self.builder = ir.IRBuilder(self.function.append_basic_block("entry"))
        self.args, self.thread, self.threads = (Value(self, a) for a in self.function.args)

    # Constants, arguments, memory

    def const(self, kind: Any, number: float) -> Value:
        """A constant of a scalar type, or of a vector type with the number in every lane."""
        if isinstance(kind, ir.VectorType):
            return Value(self, ir.Constant(kind, [ir.Constant(kind.element, number)] * kind.count))
        return Value(self, ir.Constant(kind, number))

    def i(self, number: int) -> Value:
        """An int64."""
        return self.const(I64, number)

    def f(self, number: float) -> Value:
        """A float32."""
        return self.const(F32, _f32(number))

    def vf(self, number: float) -> Value:
        """A vector with this float32 in every lane."""
        return self.const(VF, _f32(number))

    def lane_numbers(self) -> Value:
        """0, 1, ... 15 as int32."""
        return Value(self, ir.Constant(VI, [ir.Constant(I32, n) for n in range(LANES)]))

    def int_arg(self, index: int) -> Value:
        """Slot `index` as int64."""
        return self.load(self.args, index, I64)

    def ptr_arg(self, index: int) -> Value:
        """Slot `index` as a pointer."""
        return self.load(self.args, index, PTR)

    def float_arg(self, index: int) -> Value:
        """The float32 in the lower half of slot `index`."""
        return self.load(self.args, 2 * index, F32)

    def at(self, pointer: Value, offset: Value | int, kind: Any = I8) -> Value:
        """pointer + offset elements of a scalar kind."""
        raw = offset.raw if isinstance(offset, Value) else ir.Constant(I64, offset)
        return Value(self, self.builder.gep(pointer.raw, [raw], source_etype=kind))

    def load(self, pointer: Value, offset: Value | int, kind: Any) -> Value:
        """The `kind` at `offset` elements (of its scalar) behind the pointer."""
        scalar = getattr(kind, "element", kind)
        place = self.at(pointer, offset, scalar)
        return Value(self, self.builder.load(place.raw, typ=kind, align=_size(scalar)))

    def number(self, stored: str, pointer: Value, offset: Value | int, shape: Shape = _one) -> Value:
        """A number stored as F32, F16 or BF16 as float32; with the shape `lanes`, 16 of them."""
        if stored == "F32":
            return self.load(pointer, offset, shape(F32))
        if stored == "F16":
            return self.to_float(self.load(pointer, offset, shape(F16)))
        wide = self.extend(self.load(pointer, offset, shape(I16)), shape(I32))
        return self.bits(wide << 16, shape(F32))

    def store(self, value: Value, pointer: Value, offset: Value | int) -> None:
        """Writes a value at `offset` elements behind the pointer."""
        scalar = getattr(value.type, "element", value.type)
        place = self.at(pointer, offset, scalar)
        self.builder.store(value.raw, place.raw, align=_size(scalar))

    # Control

    @contextmanager
    def loop(self, low: Value | int, high: Value | int, step: Value | int = 1) -> Iterator[Value]:
        """for i in range(low, high, step)."""
        first, end, stride = (v if isinstance(v, Value) else self.i(v) for v in (low, high, step))
        before = self.builder.block
        head, body, after = (self.function.append_basic_block(n) for n in ("head", "body", "after"))
        self.builder.branch(head)
        self.builder.position_at_end(head)
        index = self.builder.phi(I64)
        index.add_incoming(first.raw, before)
        self.builder.cbranch(self.builder.icmp_signed("<", index, end.raw), body, after)
        self.builder.position_at_end(body)
        yield Value(self, index)
        index.add_incoming(self.builder.add(index, stride.raw), self.builder.block)
        self.builder.branch(head)
        self.builder.position_at_end(after)

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        """if condition."""
        with self.builder.if_then(condition.raw):
            yield

    def either(self, condition: Value, first: Callable[[], object], second: Callable[[], object]) -> None:
        """first() if condition else second()."""
        with self.builder.if_else(condition.raw) as (then, otherwise):
            with then:
                first()
            with otherwise:
                second()

    def var(self, start: Value) -> Var:
        return Var(self, start)

    @contextmanager
    def items(self, counter: Value, total: Value) -> Iterator[Value]:
        """A loop over 0 .. total - 1 that threads share: every turn takes the next item nobody has."""
        b = self.builder
        head, body, after = (self.function.append_basic_block(n) for n in ("next", "item", "done"))
        b.branch(head)
        b.position_at_end(head)
        index = b.atomic_rmw("add", counter.raw, ir.Constant(I64, 1), "acq_rel")
        b.cbranch(b.icmp_signed("<", index, total.raw), body, after)
        b.position_at_end(body)
        yield Value(self, index)
        b.branch(head)
        b.position_at_end(after)

    # Arithmetic

    def call(self, name: str, kind: Any, *arguments: Value) -> Value:
        """An intrinsic or C function."""
        found = self.module.globals.get(name)
        if found is None:
            found = ir.Function(self.module, ir.FunctionType(kind, [a.type for a in arguments]), name)
        return Value(self, self.builder.call(found, [a.raw for a in arguments]))

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a * b + c, rounded once."""
        return self.call(f"llvm.fma.{_suffix(a.type)}", a.type, a, b, c)

    def most(self, a: Value, b: Value) -> Value:
        return self.select(a > b, a, b)

    def least(self, a: Value, b: Value) -> Value:
        return self.select(a < b, a, b)

    def sqrt(self, a: Value) -> Value:
        return self.call(f"llvm.sqrt.{_suffix(a.type)}", a.type, a)

    def select(self, condition: Value, yes: Value, no: Value) -> Value:
        """yes where the condition holds, else no."""
        return Value(self, self.builder.select(condition.raw, yes.raw, no.raw))

    def splat(self, scalar: Value) -> Value:
        """A vector with the scalar in every lane."""
        kind = lanes(scalar.type)
        one = self.builder.insert_element(ir.Constant(kind, ir.Undefined), scalar.raw, ir.Constant(I32, 0))
        mask = ir.Constant(ir.VectorType(I32, LANES), [ir.Constant(I32, 0)] * LANES)
        return Value(self, self.builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), mask))

    def fold(self, vector: Value, join: Callable[[Value, Value], Value]) -> Value:
        """All lanes joined, halves first: lane i with lane i + 8, then 4, 2, 1."""
        undefined = ir.Constant(vector.type, ir.Undefined)
        for distance in (8, 4, 2, 1):
            order = [ir.Constant(I32, (n + distance) % LANES) for n in range(LANES)]
            mask = ir.Constant(ir.VectorType(I32, LANES), order)
            vector = join(vector, Value(self, self.builder.shuffle_vector(vector.raw, undefined, mask)))
        return Value(self, self.builder.extract_element(vector.raw, ir.Constant(I32, 0)))

    def total(self, vector: Value) -> Value:
        """The sum of all lanes, in `fold`'s order."""
        return self.fold(vector, lambda a, b: a + b)

    def extend(self, value: Value, kind: Any, signed: bool = False) -> Value:
        """An integer (vector) in a wider type."""
        make = self.builder.sext if signed else self.builder.zext
        return Value(self, make(value.raw, kind))

    def narrow(self, value: Value, kind: Any) -> Value:
        """An integer (vector) in a shorter type."""
        return Value(self, self.builder.trunc(value.raw, kind))

    def to_float(self, value: Value) -> Value:
        """int32 to float32, or float16 to float32, scalar or vector."""
        kind = VF if isinstance(value.type, ir.VectorType) else F32
        make = self.builder.fpext if value.is_float else self.builder.sitofp
        return Value(self, make(value.raw, kind))

    def to_int(self, value: Value) -> Value:
        """float32 to int32, cut towards zero, scalar or vector."""
        kind = VI if isinstance(value.type, ir.VectorType) else I32
        return Value(self, self.builder.fptosi(value.raw, kind))

    def bits(self, value: Value, kind: Any) -> Value:
        """The same bits as another type."""
        return Value(self, self.builder.bitcast(value.raw, kind))

    def masked_store(self, value: Value, pointer: Value, offset: Value, count: Value) -> None:
        """Writes the first `count` lanes."""
        full = count >= LANES

        def partly() -> None:
            with self.loop(0, count) as lane:
                raw = self.builder.extract_element(value.raw, self.narrow(lane, I32).raw)
                self.store(Value(self, raw), pointer, offset + lane)

        self.either(full, lambda: self.store(value, pointer, offset), partly)


def kernel(body: Callable[Concatenate[Kernel, P], None]) -> Callable[P, Write]:
    """Makes of what writes a function's body, for given parameters, what adds the whole to a module."""

    def of(*parameters: P.args, **named: P.kwargs) -> Write:
        def write(module: Any, name: str) -> None:
            k = Kernel(module, name)
            body(k, *parameters, **named)
            k.builder.ret_void()

        return write

    return of


def _suffix(kind: Any) -> str:
    return "v16f32" if isinstance(kind, ir.VectorType) else "f32"


def _size(scalar: Any) -> int:
    return 8 if isinstance(scalar, ir.PointerType) else {F16: 2, F32: 4}.get(scalar) or scalar.width // 8


def _f32(number: float) -> float:
    return float(np.float32(number))
