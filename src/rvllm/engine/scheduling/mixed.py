"""How many prompt tokens go along with decodes in one step."""

from __future__ import annotations

TILE = 128  # tokens of a step that a GPU's products take together
SPREAD = 4  # steps over which the prompts that could begin are spread


def prompt_share(decodes: int, waiting: int, most: int) -> int:
    """Prompt tokens of a step in which `decodes` sequences decode.

    waiting: prompt tokens that could be computed now. most: tokens of such a step, for decodes wait for the
    prompts beside them. Where decodes alone fill a tile, prompts are cheapest in what they leave of the next
    ones: as few go along with each step as keeps up with those that come, so that all steps share them.
    Half a tile of them always goes on.
    """
    most = max(most, decodes + TILE // 2)
    if decodes < TILE:
        return most - decodes
    wanted = decodes + max(TILE // 2, -(-waiting // SPREAD))
    return min(most, -(-wanted // TILE) * TILE) - decodes
