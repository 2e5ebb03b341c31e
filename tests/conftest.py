"""Settings for all tests. What they share is in `support`, which every test can import."""

from hypothesis import settings

settings.register_profile("busy", deadline=None)  # a busy machine is no reason to fail
settings.load_profile("busy")
