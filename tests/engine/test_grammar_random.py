"""Random requests with and without grammars, slow masks, aborts, priorities and pressure: each request gets
what it gets alone, and nothing is left behind."""

from __future__ import annotations

import random
import time
from functools import cache

import pytest

import rvllm.engine.grammar as engine_grammar
import rvllm.engine.matcher as engine_matcher
from rvllm.engine.ipc.messages import Generate, Output
from support.doubles.grammar_engine import SCHEMA, core_of, grammar, request, run

FORMS = (
    grammar(json=SCHEMA),
    grammar(regex="[a-f]{3}-[0-9]{1,4}"),
    grammar(regex="[a-z ]{100,120}"),
    grammar(choice=["abc", "abd", "xyz"]),
    None,
)


def asked(form: int, number: int) -> Generate:
    """A request that its name tells all about."""
    if FORMS[form] is None:
        return request(f"free-{number}", None, max_tokens=3 + 40 * (number % 3), stop_token_ids=())
    return request(f"form{form}-{number}", FORMS[form])


@cache
def alone(form: int, number: int) -> list[int]:
    made = asked(form, number)
    return run(core_of(1), [made])[made.request_id][0]


@pytest.mark.parametrize("seed", range(24))
def test_in_any_company(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    dice = random.Random(seed)
    slow = dice.choice([0.0, 0.05, 0.5])
    next_mask = engine_matcher.Matcher.next_mask

    def slow_mask(matcher: engine_matcher.Matcher, words: int) -> tuple[engine_matcher.Mask, float]:
        if dice.random() < slow:
            time.sleep(dice.choice([0.0005, 0.003, 0.01]))
        return next_mask(matcher, words)

    chosen = {(dice.randrange(len(FORMS)), dice.randrange(20)) for _ in range(dice.randint(2, 14))}
    wanted = {pair: alone(*pair) for pair in sorted(chosen)}
    monkeypatch.setattr(engine_matcher.Matcher, "next_mask", slow_mask)
    costly = dice.choice([0.0, 0.0005, 1e9])
    monkeypatch.setattr(engine_matcher, "COSTLY", costly)
    monkeypatch.setattr(engine_grammar, "COSTLY", costly)
    monkeypatch.setattr(engine_grammar, "ALONE", dice.choice([0, 1, 4]))
    core = core_of(dice.choice([1, 2, 3]), seqs=dice.choice([2, 5, 16]), blocks=dice.choice([45, 60, 400]))
    waiting = sorted(chosen)
    dice.shuffle(waiting)
    names, tokens, last = {}, {}, dict[str, Output]()
    aborted: set[str] = set()
    until = time.monotonic() + 60
    while waiting or core.has_work():
        assert time.monotonic() < until, "it hangs"
        if waiting and (dice.random() < 0.3 or not core.has_work()):
            pair = waiting.pop()
            made = asked(*pair)
            made.priority = dice.choice([0, 0, 1])
            core.add_request(made)
            names[made.request_id], tokens[made.request_id] = pair, list[int]()
        if names and dice.random() < 0.01:
            gone = dice.choice(sorted(names))
            aborted |= {gone} - last.keys()
            core.abort([gone])
        for output in core.step():
            assert output.request_id not in last, "an output after the end"
            tokens[output.request_id] += output.token_ids
            if output.finish_reason is not None:
                last[output.request_id] = output
    assert last.keys() == names.keys() and core.scheduler.blocks.used == 0 and len(core.grammars) == 0
    for name, pair in names.items():
        if name not in aborted:
            assert last[name].finish_reason in ("stop", "length"), last[name]
            assert tokens[name] == wanted[pair]
    core.close()
