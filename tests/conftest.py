"""Fixtures for all tests. This folder is importable: `from models import model_path` works everywhere."""

from hypothesis import settings

settings.register_profile("busy", deadline=None)  # a busy machine is no reason to fail
settings.load_profile("busy")
