"""The engine process with the double instead of a model; `--num-blocks` and `seed` choose how it behaves.

seed: milliseconds a step takes; model: "double", "double:fail-load", "double:fail-step", "double:die".
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script: for `support`

from rvllm.backends.base import Limits, Progress
from rvllm.config import EngineConfig
from rvllm.engine.core import EngineCore
from rvllm.engine.ipc.process import main
from rvllm.errors import ModelError
from support.doubles.engine import PagedDouble, SleepingDouble, facts


def make_core(config: EngineConfig, progress: Progress) -> EngineCore:
    progress(0.5, "pretending")
    if config.model == "double:fail-load":
        raise ModelError("x.gguf: magic is wrong; fetch the file again")
    if config.model == "double:die":
        os._exit(3)
    limits = Limits(config.max_num_seqs, 256, 4096, 16, config.num_blocks or 4096, 2)
    fail_at = 5 if config.model == "double:fail-step" else None
    kind = SleepingDouble if config.enable_sleep_mode else PagedDouble
    return EngineCore(kind(limits, config.seed / 1000, fail_at), facts(4096), config)


if __name__ == "__main__":
    sys.exit(main(make_core))
