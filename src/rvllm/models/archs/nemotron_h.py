"""NemotronHForCausalLM (NVIDIA 2025): Nemotron-H, Nemotron Nano 2 and 3.

Every layer is a norm and one mixer: Mamba-2 (M), attention without rope (*), a plain MLP (-) or routed
experts (E), in the order that the config spells.
"""

from __future__ import annotations

from dataclasses import replace

from rvllm.models import blocks
from rvllm.models.blocks import Dims, linear
from rvllm.models.config import ModelConfig
from rvllm.models.moe import Mixture, cut_shared, mixture, read_groups
from rvllm.program.builder import ProgramBuilder
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Add, Buffer, Part, Program, StateCache, Weight
from rvllm.program.ops.mamba2 import CausalConv, GatedNorm, StateScan

KINDS = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
NAMES = {
    "mamba": "mamba", "linear_attention": "mamba", "attention": "attention", "full_attention": "attention",
    "mlp": "mlp", "moe": "moe",
}  # fmt: skip


def build(config: ModelConfig, dtype: DType) -> Program:
    kinds = read_layers(config)
    dims = read_dims(config, len(kinds))
    mamba = Mamba(config)
    activation = blocks.read_activation(config, "mlp_hidden_act", "relu2")
    mlp_bias = config.bool("mlp_bias", False)

    b = blocks.start(config, dtype, dims, 4096)
    x = blocks.embed(b, dims, "backbone.embeddings.weight")
    for layer, kind in enumerate(kinds):
        name, source = f"layers.{layer}", f"backbone.layers.{layer}.mixer"
        normed = blocks.rms_norm(b, f"{name}.norm", x, f"backbone.layers.{layer}.norm", dims.eps)
        if kind == "mamba":
            y = mamba.emit(b, name, normed, source)
        elif kind == "attention":
            y = blocks.self_attention(b, name, normed, source, dims, None)
        elif kind == "mlp":
            sources = (f"{source}.up_proj", f"{source}.down_proj")
            y = blocks.mlp(b, f"{name}.mlp", normed, sources, dims.intermediate, activation, bias=mlp_bias)
        else:
            y = experts(b, config, f"{name}.moe", normed, source)
        blocks.residual(b, name, x, y)

    last = blocks.rms_norm(b, "final_norm", blocks.select(b, x), "backbone.norm_f", dims.eps)
    blocks.head(b, last, dims, tied=False)
    if "mamba" in kinds:
        b.note("recurrent layers: a prefix is shared where their state is kept (--num-state-snapshots)")
    return b.finish()


def read_layers(config: ModelConfig) -> list[str]:
    """The kind of each layer, from layers_block_type or the letters of hybrid_override_pattern."""
    if config.has("layers_block_type"):
        field, given, known = "layers_block_type", config.list("layers_block_type"), NAMES
    else:
        field, given, known = "hybrid_override_pattern", list(config.str("hybrid_override_pattern")), KINDS
    for kind in given:
        if kind not in known:
            raise config.fail(field, f"holds {kind!r}, supported: {', '.join(known)}")
    if not 1 <= len(given) <= 4096:
        raise config.fail(field, f"must name 1 to 4096 layers, got {len(given)}")
    return [known[kind] for kind in given]


def read_dims(config: ModelConfig, layers: int) -> Dims:
    """The dimensions; layers are counted by the pattern, not by num_hidden_layers."""
    absent = {"num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 21504}
    values = {**absent, **config.values, "num_hidden_layers": layers}
    return Dims.read(replace(config, values=values), eps="layer_norm_epsilon", head_dim=128, default_eps=1e-5)


class Mamba:
    """The Mamba-2 mixer (Dao & Gu 2024, figure 6, with the gate before the norm's groups)."""

    def __init__(self, config: ModelConfig) -> None:
        """Reads the mixer's dimensions; the groups must divide the heads."""
        self.heads = config.int("mamba_num_heads", 128, high=65536)
        self.groups = config.int("n_groups", 8, high=self.heads)
        if self.heads % self.groups:
            raise config.fail("n_groups", f"must divide mamba_num_heads {self.heads}, got {self.groups}")
        self.dim, self.size = config.int("mamba_head_dim", 64), config.int("ssm_state_size", 128)
        self.inner = self.heads * self.dim
        self.wide = self.inner + 2 * self.groups * self.size
        self.kernel = config.int("conv_kernel", 4, low=2, high=64)
        self.bias = config.bool("use_bias", False)
        self.conv_bias = config.bool("use_conv_bias", True)
        self.activation = blocks.read_activation(config, "mamba_hidden_act", "silu")
        self.floor = config.float("time_step_min", 0.001, low=0.0)
        self.eps = config.float("layer_norm_epsilon", 1e-5, low=0.0, high=1.0)

    def emit(self, b: ProgramBuilder, name: str, x: Buffer, source: str) -> Buffer:
        """Gate, inputs and time steps in one product; convolution; scan; gated norm; projection back."""
        rows = self.inner + self.wide + self.heads
        both = linear(b, f"{name}.in", x, [f"{source}.in_proj"], [rows], self.bias)
        conv = f"{source}.conv1d"
        shift = b.vector(f"{name}.conv.bias", Part(f"{conv}.bias", (self.wide,))) if self.conv_bias else None
        stored = Part(f"{conv}.weight", (self.wide, 1, self.kernel))
        taps = Weight(f"{name}.conv", (self.wide, self.kernel), (stored,), "vector")
        xbc = b.emit(
            CausalConv(
                name=f"{name}.conv", x=both, out=b.buffer(f"{name}.conv.out", self.wide), start=self.inner,
                weight=b.weight(taps), bias=shift,
                activation=self.activation,
                state=b.state(
                    StateCache(f"{name}.conv", CausalConv.elements(self.wide, self.kernel))
                ),
            )
        ).out  # fmt: skip
        vectors = [
            b.vector(f"{name}.scan.{part}", Part(f"{source}.{part}", (self.heads,)))
            for part in ("A_log", "D", "dt_bias")
        ]
        shape = {"heads": self.heads, "dim": self.dim, "groups": self.groups, "size": self.size}
        scanned = b.emit(
            StateScan(
                name=f"{name}.scan", xbc=xbc, steps=both, out=b.buffer(f"{name}.scan.out", self.inner),
                log_decay=vectors[0], skip=vectors[1], bias=vectors[2], first=self.inner + self.wide,
                state=b.state(StateCache(f"{name}.scan", StateScan.elements(**shape))),
                floor=self.floor, **shape,
            )
        ).out  # fmt: skip
        normed = b.emit(
            GatedNorm(
                name=f"{name}.gated_norm", x=scanned, gate=both, out=b.buffer(f"{name}.gated", self.inner),
                weight=b.vector(f"{name}.gated_norm", Part(f"{source}.norm.weight", (self.inner,))),
                group=self.inner // self.groups, eps=self.eps,
            )
        ).out  # fmt: skip
        return linear(b, f"{name}.out", normed, [f"{source}.out_proj"], [x.width], self.bias)


def experts(b: ProgramBuilder, config: ModelConfig, name: str, x: Buffer, source: str) -> Buffer:
    """Sigmoid-routed experts, in a narrower space where the config has one, and a shared MLP."""
    count = config.int("n_routed_experts", 8, high=65536)
    top_k = config.int("num_experts_per_tok", 2, high=count)
    grouping = replace(config, values={"n_group": 1, "topk_group": 1, **config.values})
    groups, kept = read_groups(grouping, count, top_k)
    if count < 2 * groups:
        raise config.fail("n_group", f"{groups} leaves fewer than two of {count} experts a group")
    activation = blocks.read_activation(config, "mlp_hidden_act", "relu2")
    latent, bias = config.opt_int("moe_latent_size"), config.bool("mlp_bias", False)
    width = config.int("moe_intermediate_size", 7688)
    shared_width = config.int("moe_shared_expert_intermediate_size", 7688)
    spec = Mixture(
        experts=count, top_k=top_k, width=width, activation=activation,
        parts=("up_proj", "down_proj"), correction="e_score_correction_bias", scores="sigmoid",
        groups=groups, kept_groups=kept, group_score="top2", scale=config.float("routed_scaling_factor", 1.0),
        renormalise=config.bool("norm_topk_prob", True),
        always=cut_shared(shared_width, width, bias=bias) if latent is None else 0,
    )  # fmt: skip
    narrow = x
    if latent is not None:
        narrow = linear(b, f"{name}.latent_in", x, [f"{source}.fc1_latent_proj"], [latent], bias)
    routed = mixture(b, name, x, source, spec, inner=narrow)
    if latent is not None:
        routed = linear(b, f"{name}.latent_out", routed, [f"{source}.fc2_latent_proj"], [x.width], bias)
    if spec.always:
        return routed
    shared = f"{source}.shared_experts"
    y = blocks.mlp(
        b, f"{name}.shared", x, (f"{shared}.up_proj", f"{shared}.down_proj"), shared_width, activation,
        bias=bias,
    )  # fmt: skip
    b.emit(Add(name=f"{name}.shared.add", x=routed, y=y))
    return routed
