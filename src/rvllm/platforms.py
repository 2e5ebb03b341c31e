"""vLLM's question which kind of device is there, for scripts that ask it."""

from rvllm.backends.opening import gpu_present


class Platform:
    """NVIDIA's GPUs or the CPU: there are no others here."""

    def is_cuda(self) -> bool:
        """Whether an NVIDIA GPU is visible."""
        return gpu_present()

    is_cuda_alike = is_cuda

    def is_cpu(self) -> bool:
        """Whether there is none."""
        return not gpu_present()

    def is_rocm(self) -> bool:
        return False

    is_xpu = is_tpu = is_rocm


current_platform = Platform()
