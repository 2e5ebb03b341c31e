"""Random blocks of every type of GGUF."""

import numpy as np

from rvllm.weights.checkpoint import TensorType

# Where the float16 scales of a block stand: at its start, unless said otherwise.
SCALES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q2_K": (80, 82),
          "Q3_K": (108,), "MXFP4": ()}  # fmt: skip


def random_blocks(kind: TensorType, rows: int, width: int, seed: int) -> np.ndarray:
    """Random bytes as blocks, with finite float16 scales wherever a scale may stand.

    Every third scale is subnormal, every seventh zero of either sign; half of them are negative.
    """
    elements, nbytes = kind.block
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (rows * width // elements, nbytes), dtype=np.uint8)
    for start in SCALES.get(kind.value, (0,)):
        scale = generator.normal(0, 0.02, len(blocks)).astype(np.float16)
        scale[::3] *= np.float16(2**-12)
        scale[::7] *= np.float16(0)
        blocks[:, start : start + 2] = scale.view(np.uint8).reshape(-1, 2)
    return blocks
