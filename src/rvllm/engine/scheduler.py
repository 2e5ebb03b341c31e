"""Who computes what in the next step: continuous batching over a paged cache.

One token budget a step (Sarathi-Serve, Agrawal et al. 2024): sequences that decode come first, what is
left goes to chunks of prompts, first those already running, then those waiting. Both queues are ordered
by the policy's rank (`scheduling/policy.py`). A sequence holds blocks for all its known tokens from its
admission on and takes one more whenever it grows into it; when none is left, the last in order gives up its
place and is computed again later.
"""

from __future__ import annotations

import time
from bisect import bisect_left, insort
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING

from rvllm.backends.base import Limits
from rvllm.config import EngineConfig
from rvllm.engine.blocks import ON_HOST, ROOT, BlockManager, Digest
from rvllm.engine.scheduling.cost import PrefillCost
from rvllm.engine.scheduling.host import worth_moving
from rvllm.engine.scheduling.mixed import prompt_share
from rvllm.engine.scheduling.policy import FairShares, Policy
from rvllm.engine.scheduling.snapshots import Snapshots
from rvllm.engine.sequence import Sequence
from rvllm.engine.step import Step, StepPlan
from rvllm.telemetry.stats import Stats

if TYPE_CHECKING:
    from rvllm.engine.kv_events import KvEvents

MOVE_SECONDS = 0.004  # of copies between the tiers, after which a step lets nobody in who needs more
PROMPT_LOGPROB_ROWS = 64  # a step: each needs a row of logits over the whole vocabulary

_rank = attrgetter("rank")


def _remove(queue: list[Sequence], seq: Sequence) -> None:
    del queue[bisect_left(queue, seq.rank, key=_rank)]


class Scheduler:
    """Queues, slots and blocks. `schedule` plans a step, `finish` ends a sequence at any time."""

    def __init__(self, limits: Limits, config: EngineConfig, counted: Stats) -> None:
        """counted: where hits of the prefix cache, preemptions and swaps are added up."""
        self.limits, self.counted = limits, counted
        self.policy = Policy(config.scheduling_policy, config.aging_seconds)
        self.shares = FairShares() if config.fairness != "none" else None
        self.max_delay = config.max_prefill_delay_ms / 1000  # seconds
        self.cost = PrefillCost()
        self.max_chunk = config.max_prefill_chunk or limits.max_num_batched_tokens
        caching = config.enable_prefix_caching and (limits.prefix_reuse or limits.num_snapshots > 0)
        kept = limits.num_snapshots if caching else 0
        self.snapshots = Snapshots(kept, limits.block_size) if kept else None
        self.blocks = BlockManager(limits.num_blocks, limits.block_size, caching, limits.num_cpu_blocks)
        self.preemption_mode = config.preemption_mode
        self.waiting: list[Sequence] = []  # both sorted by rank
        self.running: list[Sequence] = []
        self.steps = 0
        self.events: KvEvents | None = None
        # With more slots than budget, prompts could be kept from running by decodes forever.
        self._max_running = min(limits.max_num_seqs, limits.max_num_batched_tokens)
        self._free_slots = list(range(self._max_running - 1, -1, -1))
        self._leaders: dict[str, Sequence] = {}  # by group: who computes the prompt that it has in common
        self._computing: dict[Digest, Sequence] = {}  # who will publish a block with this digest

    def add(self, seq: Sequence) -> None:
        """Puts a sequence that fits (see `EngineCore.add_request`) into the waiting queue."""
        if self.shares is not None:
            self.shares.joined(seq.client)
        self._queue(seq)

    def _queue(self, seq: Sequence) -> None:
        seq.rank = self.policy.rank(seq)
        insort(self.waiting, seq, key=_rank)

    def schedule(self) -> Step | None:
        """Plans the next step, or None when no sequence can go on before a step in flight is collected."""
        plan = StepPlan(self.steps, self.limits.max_num_batched_tokens, PROMPT_LOGPROB_ROWS, self.max_chunk)
        self._keep_states()
        self._make_way()
        prefilling = self._plan_decodes(plan)
        if plan.decodes and self.limits.max_mixed_tokens:
            at_hand = sum(seq.length - seq.launched for seq in prefilling)
            at_hand += sum(seq.length for seq in self.waiting[: len(self._free_slots)])
            share = prompt_share(len(plan.decodes), at_hand, self.limits.max_mixed_tokens)
            plan.budget = min(plan.budget, share)
        if self.max_delay and len(self.running) > len(prefilling):
            plan.budget = min(plan.budget, self.cost.tokens(self.max_delay))
        for seq in prefilling:
            if seq.slot >= 0 and plan.budget:
                plan.add_prefill(seq)
        self._admit(plan)
        if not plan:
            return None
        self.steps += 1
        self.blocks.steps = self.steps
        plan.moves, plan.moves_after = self.blocks.take_moves()
        ahead = self.blocks.evict_ahead()
        plan.moves, plan.moves_ahead = plan.moves + ahead, len(ahead)
        return plan.finish()

    def _keep_states(self) -> None:
        """Lists copies of states that stand at a border now, before this step moves them on."""
        if self.snapshots is not None:
            for seq in self.running:
                for move in self.snapshots.reached(seq):
                    self.blocks.list_move(move)

    def _plan_decodes(self, plan: StepPlan) -> list[Sequence]:
        """Adds every sequence that waits for one token only; returns those with more to compute."""
        prefilling = []
        for seq in self.running.copy():
            left = seq.length - seq.launched
            if seq.slot < 0 or seq.length >= seq.max_length or seq.must_wait:
                continue  # preempted just now, or all its tokens are launched, or its mask is not known
            if left > 1:
                prefilling.append(seq)
            elif seq.launched < seq.capacity or self._grow(seq, plan):
                plan.add_decode(seq)
                if self.shares is not None:
                    self.shares.charge(seq.client, 1)
        return prefilling

    def _grow(self, seq: Sequence, plan: StepPlan) -> bool:
        """Gives a sequence its next block, at the cost of those behind it; False: it lost its own place."""
        while not self.blocks.available:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is seq:
                return False
        taken = self.blocks.take(1)
        plan.add_block(seq, taken[0])
        seq.give_blocks(taken)
        return True

    def _make_way(self) -> None:
        """Running sequences of lower priority leave for a waiting one that finds no slot or no blocks.

        Where clients have shares it is their turn that counts, and nobody leaves.
        """
        if not self.policy.preempts or self.shares is not None:
            return
        while self.waiting and self.running:
            first, last = self.waiting[0], self.running[-1]
            if first.priority >= last.priority or first.rank >= last.rank or first.in_flight:
                return
            if self._free_slots and self._blocks_if_fits(first) is not None:
                return
            self._preempt(last)

    def _candidates(self) -> Iterator[Sequence]:
        """Waiting sequences in the order in which they are let in; each may be taken out before the next."""
        if self.shares is not None:
            yield from self.shares.order(self.waiting)
            return
        index = 0
        while index < len(self.waiting):
            seq = self.waiting[index]
            yield seq
            index += seq.slot < 0

    def _admit(self, plan: StepPlan) -> None:
        """Lets waiting sequences in, in order, while slots, blocks and budget last.

        Passed over is one whose prefix is just being computed for another, until it can share that, and one
        whose token mask is being made.
        """
        if not (self.waiting and self._free_slots and plan.budget):
            return
        for seq in self._candidates():
            if seq.in_flight or (seq.prompt_logprobs_left and not plan.prompt_logprob_rows):
                return
            shared = self._blocks_if_fits(seq)
            if shared is None:
                return
            moving = self.blocks.moving * self.limits.block_move_seconds  # seconds that this step waits for
            if plan and ON_HOST in shared and moving > MOVE_SECONDS:
                return
            if seq.must_wait or self._soon_shared(seq, len(shared)):
                continue
            _remove(self.waiting, seq)
            self._place(seq, shared)
            plan.start(seq)
            plan.add_prefill(seq)
            if not (self._free_slots and plan.budget):
                return

    def _place(self, seq: Sequence, shared: Seq[int]) -> None:
        """A waiting sequence takes a slot, the cached blocks of its prefix and new ones for the rest."""
        restored = [index for index, block in enumerate(shared) if block == ON_HOST]
        shared = self.blocks.share(shared, seq.digests)
        if restored and self.events is not None:
            self._tell_stored(seq, restored, self.events)
        new = self.blocks.take(self.blocks.blocks_for(seq.length) - len(shared))
        seq.give_blocks([*shared, *new])
        seq.slot = self._free_slots.pop()
        seq.published = len(shared)
        seq.launched = seq.computed = len(shared) * self.limits.block_size
        if self.snapshots is not None and self._may_share(seq):
            if shared:
                self.blocks.list_move(self.snapshots.restore(seq.digests[len(shared) - 1], seq.slot))
            self.snapshots.plan(seq, len(self.blocks.find(seq.digests)))
        leader = self._leader(seq)
        if leader is not None:
            seq.launched = seq.computed = seq.prompt_len - 1
            if (
                seq.launched > len(shared) * self.limits.block_size
            ):  # the rest of a block, which both go on in
                self.blocks.copy(leader.blocks[len(shared)], new[0])
        elif seq.group:
            self._leaders.setdefault(seq.group, seq)
        if seq.first_scheduled is None:
            self._first_placed(seq, len(restored) * self.limits.block_size)
        insort(self.running, seq, key=_rank)
        for digest in seq.digests[len(shared) :]:
            self._computing.setdefault(digest, seq)

    def _first_placed(self, seq: Sequence, restored: int) -> None:
        """Books what the prefix cache held for a prompt, and charges its client for the rest.

        restored: tokens of it that came from host memory.
        """
        self.counted.host_hits += restored
        seq.first_scheduled = time.time()
        seq.cached_tokens = seq.launched
        if self._may_share(seq):
            self.counted.prefix_queries += seq.prompt_len
            self.counted.cached_prompt_tokens += seq.cached_tokens
        if self.shares is not None:
            self.shares.charge(seq.client, seq.prompt_len - seq.cached_tokens)

    def _leader(self, seq: Sequence) -> Sequence | None:
        """The running sequence of its group with whose prompt a sequence can begin, itself at the prompt."""
        if not self.limits.block_copies or seq.length > seq.prompt_len or seq.prompt_logprobs_left:
            return None
        return self._leaders.get(seq.group)

    def _soon_shared(self, seq: Sequence, index: int) -> bool:
        """Whether a running sequence has yet to compute what this one will have in common with it, or to
        publish what this one needs as its block `index`."""
        leader = self._leader(seq)
        if leader is not None:
            return leader.computed < seq.prompt_len - 1
        if not self._may_share(seq) or index >= len(seq.digests):
            return False
        if self.snapshots is not None:
            kept = self.snapshots.longest(seq.digests)
            owner = self._computing.get(seq.digests[kept - 1]) if kept > index else None
            if owner is not None and owner.published < kept:
                return True
            return self.snapshots.awaited(seq.digests[index:])
        owner = self._computing.get(seq.digests[index])
        return owner is not None and owner.published <= index

    def _may_share(self, seq: Sequence) -> bool:
        return self.blocks.caching and not seq.prompt_logprobs_left

    def _blocks_if_fits(self, seq: Sequence) -> list[int] | None:
        """The cached blocks of its prefix, or None when there are too few blocks for the rest.

        One block is left for each running sequence to grow into, so that newcomers do not push each
        other out at once. The last token is always computed: the next one is drawn from it.
        """
        shared = self._shared(seq)
        needed = self.blocks.blocks_for(seq.length) - len(shared) + self.blocks.idle_among(shared)
        return shared if needed + len(self.running) <= self.blocks.available else None

    def _shared(self, seq: Sequence) -> list[int]:
        """The cached blocks that a waiting sequence can go on from."""
        leader = self._leader(seq)
        if leader is not None:
            return leader.blocks[: (seq.prompt_len - 1) // self.limits.block_size]
        if not self._may_share(seq):
            return []
        found = self.blocks.find(seq.digest_chain((seq.length - 1) // self.limits.block_size))
        return found if self.snapshots is None else found[: self.snapshots.longest(seq.digests[: len(found)])]

    def preempt_all(self) -> None:
        """Every running sequence gives its place up and will be computed again."""
        for seq in reversed(self.running.copy()):
            self._preempt(seq)

    def _preempt(self, seq: Sequence) -> None:
        self.counted.preemptions += 1
        keep = self.blocks.host is None or worth_moving(
            self.preemption_mode, self.limits.block_size, self.limits.block_move_seconds, self.cost
        )
        self.counted.swaps += keep and self.blocks.host is not None
        self._take_place(seq, keep)
        _remove(self.running, seq)
        self._queue(seq)

    def suspend(self) -> None:
        """All that run begin to wait, and no block holds anything any more; nothing may be in flight."""
        self.preempt_all()
        self.forget()
        self.blocks.take_moves()

    def forget(self) -> None:
        """Forgets every prefix that no sequence holds."""
        self.blocks.forget()
        if self.snapshots is not None:
            self.snapshots.forget()

    def _take_place(self, seq: Sequence, keep: bool = True) -> None:
        """Slot and blocks are free at once: whoever takes them is launched after the steps in flight.

        keep: whether what the blocks hold may move to host memory.
        """
        for digest in seq.digests:
            if self._computing.get(digest) is seq:
                del self._computing[digest]
        if self._leaders.get(seq.group) is seq:
            del self._leaders[seq.group]
        if self.snapshots is not None:
            self.snapshots.leave(seq)
        self._free_slots.append(seq.slot)
        self.blocks.release(seq.lose_place(), keep)

    def publish(self, seq: Sequence) -> None:
        """Offers the full blocks that a sequence has computed to the prefix cache."""
        full = seq.computed // self.limits.block_size
        if self.blocks.caching and full > seq.published:
            digests = seq.digest_chain(full)
            new = [i for i in range(seq.published, full) if self.blocks.publish(seq.blocks[i], digests[i])]
            if self.events is not None and new:
                self._tell_stored(seq, new, self.events)
        seq.published = full

    def _tell_stored(self, seq: Sequence, new: list[int], events: KvEvents) -> None:
        """Tells of a sequence's blocks that can be found from now on, those in a row together."""
        size = self.limits.block_size
        for _, row in groupby(enumerate(new), lambda pair: pair[1] - pair[0]):
            blocks = [index for _, index in row]
            first, end = blocks[0], blocks[-1] + 1
            parent = seq.digests[first - 1] if first else ROOT
            events.stored(parent, seq.digests[first:end], seq.tokens[first * size : end * size])

    def waiting_since(self, moment: float) -> list[Sequence]:
        """Sequences that arrived before a moment, time.time(), and of which nothing was ever computed."""
        return [s for s in self.waiting if s.first_scheduled is None and s.arrival and s.arrival < moment]

    def finish(self, seq: Sequence, reason: str) -> None:
        """Ends a sequence, wherever it is; what steps in flight still draw for it is discarded."""
        seq.finish_reason = reason
        if self.shares is not None:
            self.shares.left(seq.client)
        if seq.slot < 0:
            _remove(self.waiting, seq)
        else:
            _remove(self.running, seq)
            self._take_place(seq)
