"""Launches of one token, joined: a norm becomes part of the product behind it, neighbours become one launch.

`--decode-path gemv` has a launch a product, `fused` takes in the norms, `persistent` joins neighbours too, a
mixture's among them; its blocks then wait for each other between two steps, where others wait for a launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rvllm.backends.cuda.device.info import DeviceInfo
from rvllm.backends.cuda.device.launches import Planned, fixed
from rvllm.backends.cuda.ops.decode.one import one_token_launch
from rvllm.backends.cuda.ops.decode.races import faults
from rvllm.backends.cuda.ops.decode.step import NormFront, Step, Type, plan_chain
from rvllm.kernels.decode.specs import MAX_NORM_WIDTH, MAX_STEPS, ONE_NORM_WIDTH

PATHS = ("gemv", "fused", "persistent")  # for one token; all others are `batched` for it too
ARRIVALS = "chain.arrivals"  # scratch: blocks counted where they wait for each other


@dataclass(frozen=True)
class Steps:
    """What a launch of `chain` computes."""

    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Part:
    """What a launch of another kernel computes, as a step of a mixture: only beside the other parts."""

    step: Step


@dataclass(frozen=True)
class AddFront:
    """x += scale * y, and a norm of x."""

    y: int
    scale: float
    norm: NormFront


@dataclass(frozen=True)
class Joiner:
    """Joins one token's launches as the decode path says. arrivals: see `ChainPlan.arguments`."""

    path: str
    tag: str
    chip: DeviceInfo
    arrivals: int

    def launch(self, name: str, steps: tuple[Step, ...]) -> Planned:
        """One launch of these steps. Raises MissingKernelError where there is no room for them."""
        if self.path not in PATHS:
            (step,) = steps
            return replace(one_token_launch(name, step, self.tag, self.chip.sm_count), does=Steps(steps))
        plan = plan_chain(steps, self.tag, self.chip.sm_count, self.chip.smem_per_block)
        if wrong := faults(steps, plan.grid, self.chip.sm_count):
            raise RuntimeError(f"{name} must not be one launch: {'; '.join(wrong)}")
        normed = any(step.norm for step in steps)
        return Planned(
            name,
            plan.kernel,
            fixed(plan.grid),
            plan.block,
            plan.arguments(self.arrivals),
            plan.smem,
            why=f"{len(steps)} steps" if len(steps) > 1 else "norm and product" if normed else "one token",
            does=Steps(steps),
        )

    def joined(self, planned: Sequence[Planned]) -> list[Planned]:
        """The same launches or fewer, in order."""
        if self.path == "gemv":
            return list(planned)
        done: list[Planned] = []
        todo = self._with_mixtures(planned) if self.path == "persistent" else list(planned)
        for launch in todo:
            done.append(self._after(done, launch) if isinstance(launch.does, Steps) else launch)
        return done

    def _after(self, done: list[Planned], launch: Planned) -> Planned:
        """The launch with what it takes over of those before it, which it removes."""
        assert isinstance(launch.does, Steps)
        steps, name = launch.does.steps, launch.op
        before = done[-1].does if done else None
        widest = MAX_NORM_WIDTH if self.path in PATHS else ONE_NORM_WIDTH
        if isinstance(before, NormFront) and _takes(steps[0], before, widest):
            name = f"{done.pop().op} + {name}"
            steps = (steps[0].normed(before), *steps[1:])
            before = done[-1].does if done else None
        if self.path == "persistent" and isinstance(before, Steps) and _fit(before.steps, steps):
            name = f"{done.pop().op} + {name}"
            steps = (*before.steps, *steps)
        return self.launch(name, steps)

    def _with_mixtures(self, planned: Sequence[Planned]) -> list[Planned]:
        """The launches, those of a mixture's router, up and down matrices as one."""
        done: list[Planned] = []
        todo = list(planned)
        while todo:
            parts = [launch.does.step for launch in todo[:3] if isinstance(launch.does, Part)]
            if [part.type for part in parts] != [Type.ROUTE, Type.UP, Type.DOWN]:
                done.append(todo.pop(0))
                continue
            route, up, down = parts
            name = " + ".join(dict.fromkeys(launch.op for launch in todo[:3]))
            del todo[:3]
            add = todo[0].does if todo else None
            if isinstance(add, AddFront) and add.y == down.out and not down.residual:
                # The sum goes where it is added, and the norm stands alone until a product takes it.
                down = replace(down, out=add.norm.x, residual=add.norm.x, scale=add.scale)
                behind = self._norm_alone(todo.pop(0), add.norm)
                done += [self.launch(name, (route, up, down)), behind]
            else:
                done.append(self.launch(name, (route, up, down)))
        return done

    def _norm_alone(self, launch: Planned, norm: NormFront) -> Planned:
        """The launch of an add and a norm without the add."""
        out, x, _, *rest = launch.parameters
        kernel = launch.kernel.replace("_add", "")
        return replace(launch, kernel=kernel, parameters=[out, x, 0, *rest], does=norm)


def used(planned: Sequence[Planned], path: str) -> bool:
    """Whether a step has what tells this path from those before it."""
    chains = [launch.does.steps for launch in planned if isinstance(launch.does, Steps)]
    if path == "fused":
        return any(step.norm for steps in chains for step in steps)
    return any(len(steps) > (path == "persistent") for steps in chains)


def _takes(step: Step, norm: NormFront, widest: int = MAX_NORM_WIDTH) -> bool:
    """Whether a step can do the norm before it: no block may write what others have yet to read."""
    fits = step.x == norm.normed and norm.width == step.k <= widest and step.norm is None
    return fits and not faults((step.normed(norm),), 1, 1)


def _fit(first: tuple[Step, ...], second: tuple[Step, ...]) -> bool:
    """Whether one launch has room for both, and no more than one choice of experts to keep."""
    choices = sum(step.type == Type.UP for step in (*first, *second))
    return len(first) + len(second) <= MAX_STEPS and choices <= 1
