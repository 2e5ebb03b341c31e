"""Faults that drills and tests bring about: of a GPU, of weights."""
