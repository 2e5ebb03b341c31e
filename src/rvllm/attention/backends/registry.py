"""vLLM's names of attention kernels, for scripts that mention one; none changes a result here."""

from enum import Enum


class AttentionBackendEnum(Enum):
    """The names that vLLM's examples use."""

    FLASH_ATTN = "FLASH_ATTN"
    FLASHINFER = "FLASHINFER"
    FLEX_ATTENTION = "FLEX_ATTENTION"
    TRITON_ATTN = "TRITON_ATTN"
