"""vLLM's name for ending what runs on several devices."""


def cleanup_dist_env_and_memory(shutdown_ray: bool = False) -> None:
    """Does nothing: one device is used, and closing an `LLM` gives its memory back."""


__all__ = ["cleanup_dist_env_and_memory"]
