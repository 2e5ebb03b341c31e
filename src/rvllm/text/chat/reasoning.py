"""Thoughts of thinking models, split from their answers while both come."""

from __future__ import annotations

from dataclasses import dataclass

from rvllm.errors import UsageError
from rvllm.text.stop import first_possible


@dataclass(frozen=True)
class ReasoningFormat:
    """How a family of models marks its thoughts.

    implied: an answer begins within thoughts although nothing has opened them.
    """

    name: str
    begin: str
    end: str
    implied: bool = False


FORMATS = {
    f.name: f
    for f in (
        ReasoningFormat("think", "<think>", "</think>"),
        ReasoningFormat("mistral", "[THINK]", "[/THINK]"),
        ReasoningFormat("command-r", "<|START_THINKING|>", "<|END_THINKING|>"),
        ReasoningFormat("seed_oss", "<seed:think>", "</seed:think>"),
        ReasoningFormat("gemma4", "<|channel>thought", "<channel|>"),
        ReasoningFormat("hy_v3", "<think:opensource>", "</think:opensource>"),
        ReasoningFormat("minimax_m3", "<mm:think>", "</mm:think>"),
        ReasoningFormat("deepseek_r1", "<think>", "</think>", implied=True),
    )
}
# vLLM's names for the same, with its meanings: some take an answer for thoughts until these end.
SAME = {
    "qwen3": "think", "deepseek_v3": "think", "glm45": "think", "kimi_k2": "think", "olmo3": "think",
    "ernie45": "think", "holo2": "think", "glm47": "think", "mimo": "think", "deepseek_v4": "think",
    "poolside_v1": "think", "cohere": "command-r", "cohere_command3": "command-r",
    "cohere_command4": "command-r", "minimax_m2": "deepseek_r1", "step3": "deepseek_r1",
    "step3p5": "deepseek_r1", "nemotron_v3": "deepseek_r1",
}  # fmt: skip
CHOICES = ("auto", "none", *FORMATS, *SAME)


def reasoning_format(chosen: str, template: str | None) -> ReasoningFormat | None:
    """The format of `--reasoning-parser`; with "auto", the one whose marks the chat template names.

    Raises UsageError for an unknown name.
    """
    if chosen == "none":
        return None
    if chosen == "auto":
        return next((f for f in FORMATS.values() if template and f.end in template), None)
    found = FORMATS.get(SAME.get(chosen, chosen))
    if found is None:
        raise UsageError(f"--reasoning-parser: {chosen!r} is not one of {', '.join(CHOICES)}")
    return found


def begins_within(prompt: str, known: ReasoningFormat | None) -> bool | None:
    """Whether the answer begins within thoughts; None where it can have none.

    It does where the prompt ends with the beginning of thoughts. It can have none without a format, and where
    the prompt has closed thoughts that are else implied.
    """
    if known is None or (known.implied and prompt.rstrip().endswith(known.end)):
        return None
    return known.implied or prompt.rstrip().endswith(known.begin)


class ReasoningSplitter:
    """Splits one answer into thoughts and words, however it is cut into pieces."""

    def __init__(self, known: ReasoningFormat, inside: bool) -> None:
        """inside: the prompt has opened the thoughts already."""
        self._format = known
        self._state = "thoughts" if inside and not known.implied else "start"
        self._held = ""
        self._lead = True  # whitespace at the beginning of thoughts or words is dropped

    @property
    def inside(self) -> bool:
        """Whether what comes next is a thought, as far as is known."""
        return self._state == "thoughts"

    @property
    def thinking(self) -> bool:
        """Whether no word of the answer can have come yet."""
        return self._state != "words"

    def feed(self, text: str, final: bool = False) -> tuple[str, str]:
        """(thoughts, words) that this piece of text completes. final: no more text comes."""
        self._held += text
        thoughts = words = ""
        if self._state == "start":
            self._start(final)
        if self._state == "thoughts":
            thoughts = self._thoughts(final)
        if self._state == "words" and self._held:
            words, self._held = self._trimmed(self._held), ""
        return thoughts, words

    def _start(self, final: bool) -> None:
        bare = self._held.lstrip()
        if bare.startswith(self._format.begin):
            self._held = bare[len(self._format.begin) :]
            self._state = "thoughts"
        elif final or not self._format.begin.startswith(bare):
            if self._format.implied:
                self._state = "thoughts"
            else:
                self._state, self._lead = "words", False

    def _thoughts(self, final: bool) -> str:
        end = self._format.end
        at = self._held.find(end)
        if at >= 0:
            found = self._trimmed(self._held[:at]).rstrip()
            self._held = self._held[at + len(end) :]
            self._state, self._lead = "words", True
            return found
        bare = self._held if final else self._held[: first_possible(self._held, [end])]
        keep = len(bare.rstrip())  # whitespace before the end mark is none of the thoughts
        found, self._held = self._trimmed(self._held[:keep]), self._held[keep:]
        if final:
            self._held = ""
        return found

    def _trimmed(self, text: str) -> str:
        if not self._lead:
            return text
        text = text.lstrip()
        self._lead = not text
        return text
