"""Element types as kernels spell them, and as kernel names do."""

from __future__ import annotations

TYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "float"}
SHORT = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
