"""Runs a list of kernels on several threads, each kernel finished before the next begins.

The whole list is one call from Python, so between two kernels there is no interpreter, only this: whoever is
there takes a kernel's next free item; when none is left, a thread waits for those still at work on theirs
and goes on. Nobody waits for a thread that the system has not let in: it joins at the kernel where the others
are, or never.
"""

from __future__ import annotations

from llvmlite import ir

from rvllm.backends.cpu.compiled.codegen.emit import I64, PTR, Kernel, Value, kernel

ENTRY = 3  # slots a kernel: its address, that of its arguments, that of its line
NEXT, ACTIVE = 0, 1  # of a line: the next free item, and how many threads are at work
SPINS = 4000  # turns to wait before the processor is offered to others


@kernel
def schedule(k: Kernel) -> None:
    """Arguments: the number of kernels, then ENTRY slots for each. Lines are zero to begin with."""
    kind = ir.FunctionType(ir.VoidType(), [PTR, I64, I64])
    with k.loop(0, k.int_arg(0)) as index:
        at = index * ENTRY + 1
        function, arguments, line = (
            k.load(k.args, at, I64),
            k.load(k.args, at + 1, PTR),
            k.load(k.args, at + 2, PTR),
        )
        active = k.at(line, ACTIVE, I64)
        k.builder.atomic_rmw("add", active.raw, ir.Constant(I64, 1), "acq_rel")
        typed = k.builder.inttoptr(function.raw, ir.PointerType(kind))
        k.builder.call(typed, [arguments.raw, k.thread.raw, k.threads.raw])
        k.builder.atomic_rmw("sub", active.raw, ir.Constant(I64, 1), "acq_rel")
        _wait(k, active)


def _wait(k: Kernel, active: Value) -> None:
    """Until nobody is at work."""
    b = k.builder
    turns = k.var(k.i(0))
    head, body, after = (k.function.append_basic_block(n) for n in ("waiting", "spin", "go"))
    b.branch(head)
    b.position_at_end(head)
    now = b.load_atomic(active.raw, "acquire", 8, typ=I64)
    b.cbranch(b.icmp_signed("!=", now, ir.Constant(I64, 0)), body, after)
    b.position_at_end(body)
    turns.set(turns.get() + 1)
    k.either(turns.get() > SPINS, lambda: k.call("sched_yield", ir.IntType(32)), lambda: _pause(k))
    b.branch(head)
    b.position_at_end(after)


def _pause(k: Kernel) -> None:
    """Tells an x86 processor that this is a waiting loop; elsewhere nothing."""
    if k.module.triple.startswith("x86_64"):
        k.call("llvm.x86.sse2.pause", ir.VoidType())
