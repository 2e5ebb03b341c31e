"""What all GGUF files of tiny models have in common, with the gguf package's writer and name tables."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from support.models.archs_tiny import F32


def write_file(
    path: Path,
    arch: gguf.MODEL_ARCH,
    config: dict[str, Any],
    metadata: Callable[[gguf.GGUFWriter], None],
    tensors: dict[str, F32],
    *,
    quantised: gguf.GGMLQuantizationType | None = None,
    instead: dict[str, F32] | None = None,
) -> Path:
    """Writes `path`: the sizes that every config has, what `metadata` adds, tensors under llama.cpp's names.

    quantised: the type of stacked experts; all else is float32. instead: replaces tensors by llama.cpp's
    names.
    """
    writer = gguf.GGUFWriter(str(path), gguf.MODEL_ARCH_NAMES[arch])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    metadata(writer)
    table = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    for source, tensor in tensors.items():
        known = table.get_name(source, try_suffixes=(".weight", ".bias"))
        assert known is not None, source
        array = np.ascontiguousarray((instead or {}).get(known, tensor))
        if quantised is not None and "_exps" in known:
            writer.add_tensor(known, gguf.quantize(array, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(known, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def stacked(tensors: dict[str, F32]) -> dict[str, F32]:
    """The tensors with those of a layer's experts stacked in one."""
    out: dict[str, F32] = {}
    experts: dict[str, dict[int, F32]] = {}
    for source, tensor in tensors.items():
        if of_expert := re.fullmatch(r"(.*\.experts)\.(\d+)\.(.*)", source):
            experts.setdefault(f"{of_expert[1]}.{of_expert[3]}", {})[int(of_expert[2])] = tensor
        else:
            out[source] = tensor
    return out | {name: np.stack([found[e] for e in range(len(found))]) for name, found in experts.items()}
