"""Weight formats on the GPU, one module each."""

from __future__ import annotations

from rvllm.backends.cuda.formats.base import DeviceFormat
from rvllm.backends.cuda.formats.fp8 import Fp8Device
from rvllm.backends.cuda.formats.integer import IntegerDevice
from rvllm.program.formats import Fp8Format, IntegerFormat, WeightFormat

FORMATS: dict[type[WeightFormat], DeviceFormat] = {Fp8Format: Fp8Device(), IntegerFormat: IntegerDevice()}


def device_format(kept: WeightFormat) -> DeviceFormat:
    """What the GPU does with a format."""
    return FORMATS[type(kept)]
