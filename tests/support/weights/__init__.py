"""Model files written byte by byte; checkpoints quantised as the tools of the field do."""
