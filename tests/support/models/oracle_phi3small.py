"""Phi-3-small in plain PyTorch, written from the definition in the model code published with its weights.

Independent of rvllm: dense masks, one sequence, whole prompts, weights under their published names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F


class Phi3Small:
    """`config` as published; `tensors` by name, float32. `served`: the longest sequence asked for."""

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], served: int) -> None:
        self.config = config
        self.weights = {name: torch.from_numpy(array) for name, array in tensors.items()}
        self.heads = config["num_attention_heads"]
        self.kv_heads = config["num_key_value_heads"]
        self.dim = config["hidden_size"] // self.heads
        self.served = served

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        eps = self.config.get("layer_norm_epsilon", 1e-5)
        return F.layer_norm(
            x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], eps
        )

    def angles(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [length, dim]."""
        config = self.config
        exponent = torch.arange(0, self.dim, 2).double() / self.dim
        inverse = 1.0 / config["rope_embedding_base"] ** exponent
        positions, factor = torch.arange(length).double(), 1.0
        long = config.get("rope_scaling")
        if long is None:
            positions = positions / config.get("rope_position_scale", 1.0)
        elif self.served > long["original_max_position_embeddings"]:
            inverse, factor = inverse / torch.tensor(long["long_factor"]).double(), long["long_mscale"]
        else:
            inverse, factor = inverse / torch.tensor(long["short_factor"]).double(), long["short_mscale"]
        table = torch.outer(positions, inverse)
        table = torch.cat([table, table], dim=-1)
        return (table.cos() * factor).float(), (table.sin() * factor).float()

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """x [heads, T, dim]."""
        cos, sin = self.angles(x.shape[1])
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    def visible(self, layer: int, length: int) -> torch.Tensor:
        """[heads, T, T]: whether a query sees a key."""
        config = self.config
        seen = torch.ones(length, length).tril().bool().expand(self.heads, -1, -1).clone()
        every = config["dense_attention_every_n_layers"]
        if every and (layer + 1) % every == 0:
            return seen
        block, stride = (
            torch.arange(length) // config["blocksparse_block_size"],
            config["blocksparse_vert_stride"],
        )
        local = block[:, None] - block[None, :] < config["blocksparse_num_local_blocks"]
        for head in range(self.heads):
            step = (
                0 if config.get("blocksparse_homo_head_pattern", False) else max(1, int(stride / self.heads))
            )
            striped = (block + head * step + 1) % stride == 0
            seen[head] &= local | striped[None, :]
        return seen

    def attention(self, x: torch.Tensor, layer: int, name: str) -> torch.Tensor:
        config, length, group = self.config, len(x), self.heads // self.kv_heads
        mixed = self.linear(x, f"{name}.query_key_value").view(length, self.kv_heads, group + 2, self.dim)
        q = mixed[:, :, :-2].reshape(length, self.heads, self.dim).transpose(0, 1)
        k = mixed[:, :, -2].transpose(0, 1).repeat_interleave(group, dim=0)
        v = mixed[:, :, -1].transpose(0, 1).repeat_interleave(group, dim=0)
        divisor = math.sqrt(self.dim)
        if config.get("mup_use_scaling", True):
            divisor = self.dim / config["mup_attn_multiplier"]
        scores = self.rotate(q) @ self.rotate(k).transpose(1, 2) / divisor
        scores = scores.masked_fill(~self.visible(layer, length), -math.inf)
        out = scores.softmax(dim=-1) @ v
        return self.linear(out.transpose(0, 1).reshape(length, -1), f"{name}.dense")

    def mlp(self, x: torch.Tensor, name: str) -> torch.Tensor:
        both, limit = self.linear(x, f"{name}.up_proj"), self.config["gegelu_limit"]
        gate, up = both[..., ::2], both[..., 1::2]
        if limit is not None:
            gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
        return self.linear(gate * torch.sigmoid(1.702 * gate) * (up + 1), f"{name}.down_proj")

    @torch.no_grad()
    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """[T, vocab]; places of the vocabulary that only pad it are -inf."""
        config, embedding = self.config, self.weights["model.embed_tokens.weight"]
        x = embedding[torch.from_numpy(tokens).long()]
        if config["mup_embedding_multiplier"]:
            x = x * config["mup_embedding_multiplier"]
        for layer in range(config["num_hidden_layers"]):
            name = f"model.layers.{layer}"
            x = x + self.attention(self.norm(x, f"{name}.input_layernorm"), layer, f"{name}.self_attn")
            x = x + self.mlp(self.norm(x, f"{name}.post_attention_layernorm"), f"{name}.mlp")
        x = self.norm(x, "model.final_layernorm")
        out = F.linear(x, embedding if config["tie_word_embeddings"] else self.weights["lm_head.weight"])
        if config["mup_width_multiplier"]:
            out = out / config["mup_width_multiplier"]
        out[:, list(config.get("dummy_token_indices", []))] = -math.inf
        return out.numpy()

    def greedy(self, tokens: np.ndarray, count: int) -> list[int]:
        """The next `count` tokens."""
        ids = tokens
        for _ in range(count):
            ids = np.append(ids, self.logits(ids)[-1].argmax().astype(ids.dtype))
        return ids[len(tokens) :].tolist()
