"""Fixtures for all tests. This folder is importable: `from models import model_path` works everywhere."""
