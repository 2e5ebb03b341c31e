"""Beam search over an `LLM`: as vLLM's, a step for all beams at a time, by their log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rvllm.engine.sampling_params import BeamSearchParams, SamplingParams
from rvllm.text.requests import Prompt

if TYPE_CHECKING:
    from rvllm.offline.llm import LLM


@dataclass(slots=True)
class BeamSearchSequence:
    """One continuation. tokens: the prompt's and its own; cum_logprob: of its own, summed up."""

    tokens: list[int]
    cum_logprob: float = 0.0
    text: str | None = None
    finish_reason: str | None = None


@dataclass(slots=True)
class BeamSearchOutput:
    """The continuations of a prompt, the best first."""

    sequences: list[BeamSearchSequence]


def beam_search(llm: LLM, prompt: str | None, ids: list[int], params: BeamSearchParams) -> BeamSearchOutput:
    """The best continuations of a prompt, by log-probability over length ** length_penalty.

    A beam that draws the model's end token is done, unless `ignore_eos`. Every step keeps the best
    `beam_width` of the beams' most likely next tokens, twice as many of each.
    """
    ends = frozenset(() if params.ignore_eos else llm.engine.facts.eos_token_ids)
    step = SamplingParams(temperature=params.temperature, max_tokens=1, logprobs=2 * params.beam_width,
                          ignore_eos=True, detokenize=False)  # fmt: skip
    beams, done = [BeamSearchSequence(list(ids))], list[BeamSearchSequence]()
    for _ in range(params.max_tokens):
        asked: list[Prompt] = [{"prompt_token_ids": beam.tokens} for beam in beams]
        outputs = llm.generate(asked, step, use_tqdm=False)
        grown = []
        for beam, output in zip(beams, outputs, strict=True):
            (found,) = output.outputs[0].logprobs or [{}]
            for token, entry in found.items():
                grown.append(BeamSearchSequence([*beam.tokens, token], beam.cum_logprob + entry.logprob))
        grown.sort(key=lambda beam: -beam.cum_logprob)
        beams = []
        for beam in grown:
            if beam.tokens[-1] in ends:
                beam.finish_reason = "stop"
                done.append(beam)
            elif len(beams) < params.beam_width:
                beams.append(beam)
        if not beams:
            break
    for beam in beams:
        beam.finish_reason = "length"
    best = sorted([*done, *beams], key=lambda beam: -_score(beam, len(ids), ends, params))[
        : params.beam_width
    ]
    for beam in best:
        beam.text = None if llm.tokenizer is None else llm.tokenizer.decode(beam.tokens)
    return BeamSearchOutput(best)


def _score(beam: BeamSearchSequence, prompt: int, ends: frozenset[int], params: BeamSearchParams) -> float:
    length = len(beam.tokens) - prompt - (beam.tokens[-1] in ends)
    return float(beam.cum_logprob / max(length, 1) ** params.length_penalty)
