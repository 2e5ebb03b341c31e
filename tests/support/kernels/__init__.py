"""Checks of kernels for any machine that launches them: a GPU or the emulator."""
