"""Fixed prompts for measurements, of mixed length and kind, and random token ids for exact lengths."""

from __future__ import annotations

import random

PROMPTS = (
    "Explain in simple terms why the sky is blue during the day and red at sunset.",
    "Write a Python function that merges two sorted lists into one, and explain its running time.",
    "List the steps for repotting a house plant, with one sentence on what can go wrong at each of them.",
    "A train leaves at 9:40 and arrives at 12:05. How long is the journey? Show how you worked it out.",
    "Summarise the plot of a story in which a lighthouse keeper finds a letter addressed to someone born "
    "a hundred years later.",
    "Translate into French, German and Spanish: 'The library opens at ten and closes at six.'",
    "What should a small team agree on before it puts its first service into production?",
    "Describe how a bicycle stays upright, first for a child and then for an engineer.",
    "Write a short, polite e-mail that asks a supplier to bring a delivery forward by one week.",
    "Compare merge sort and quicksort: memory, worst case, and when you would pick which.",
    "Give three arguments for and three against replacing all street lights of a town within one year.",
    "Write a limerick about a compiler that only reports errors on Fridays.",
    "What is the difference between weather and climate? Give an everyday example of each.",
    "Here is a list of words: river, stone, lamp, seven, quiet. Use every one of them in a paragraph about "
    "an evening walk, then count the sentences that you wrote.",
    "Explain what a hash table is to somebody who has only ever used paper card indexes.",
    "Plan a three-day visit to a city by the sea for two people who like food and dislike crowds.",
)


def fixed(count: int) -> list[str]:
    """`count` prompts, the list above over and over; a repeated one gets a number so that none is cached."""
    return [
        PROMPTS[i % len(PROMPTS)] if i < len(PROMPTS) else f"({i}) {PROMPTS[i % len(PROMPTS)]}"
        for i in range(count)
    ]


def random_tokens(count: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    """`count` prompts of `length` random token ids each; the same for the same seed."""
    source = random.Random(seed)
    return [[source.randrange(vocab_size) for _ in range(length)] for _ in range(count)]
