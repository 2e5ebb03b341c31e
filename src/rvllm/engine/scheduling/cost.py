"""What computing a prompt costs, for whoever weighs it against something else."""

from __future__ import annotations

from collections import deque


class PrefillCost:
    """What a prompt token costs, as it was measured lately.

    The time of a step with prompts beyond that of the last steps without, by its prompt tokens. The dearest
    of the last few counts, for attention makes a prompt's end dearer than its beginning.
    """

    LEAST = 16  # prompt tokens of a step that is counted: fewer tell more of the step's fixed costs
    RECENT = 4

    def __init__(self) -> None:
        self._costs: deque[float] = deque(maxlen=self.RECENT)  # seconds of a prompt token
        self._decode = 0.0  # seconds of a step of decodes alone

    @property
    def dearest(self) -> float:
        """Seconds of a prompt token; 0 before any was measured."""
        return max(self._costs, default=0.0)

    def measured(self, seconds: float, decodes: int, prompt_tokens: int) -> None:
        """A step with so many decodes and so many prompt tokens took so long on the device."""
        if seconds and not prompt_tokens:
            self._decode = seconds if not self._decode else 0.8 * self._decode + 0.2 * seconds
        elif seconds and prompt_tokens >= self.LEAST:
            alone = self._decode if decodes else 0.0
            self._costs.append(max(seconds - alone, 0.0) / prompt_tokens)

    def tokens(self, seconds: float) -> int:
        """Prompt tokens that take at most so long; LEAST before anything is known, and never fewer."""
        return max(self.LEAST, int(seconds / self.dearest)) if self.dearest else self.LEAST
