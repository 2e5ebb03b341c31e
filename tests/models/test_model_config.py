"""Reading configs: what is accepted, and that each refusal names file and field."""

import math

import pytest

from rvllm.errors import ModelError
from rvllm.models.config import ModelConfig, token_ids
from rvllm.models.registry import ARCHITECTURES, build_program, supported
from rvllm.models.rope import max_positions, read_rope
from rvllm.program.cost import kv_bytes_per_token
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Attention, Linear, Logits, RopeKV
from support.models import tiny

LLAMA = tiny.CASES["llama"]


def config(**fields: object) -> ModelConfig:
    return ModelConfig(LLAMA | fields, "x/config.json")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "48"}, "hidden_size must be a whole number"),
        ({"hidden_size": -1}, "hidden_size must be in"),
        ({"hidden_size": 1 << 40}, "hidden_size must be in"),
        ({"hidden_size": True}, "hidden_size must be a whole number"),
        ({"hidden_size": 49}, "num_attention_heads must divide hidden_size"),
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, "num_key_value_heads must divide"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be in"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps must be a number"),
        ({"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu', supported:"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"head_dim": 15}, "head_dim must leave an even number"),
        ({"rope_scaling": [1]}, "rope_scaling must be an object"),
        ({"rope_scaling": {"type": "spiral"}}, "rope_scaling: type is 'spiral'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: factor is missing"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 4,
                    "high_freq_factor": 4,
                }
            },
            "rope_scaling: high_freq_factor must be above low_freq_factor 4, got 4",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_theta": 1.0}, "rope_theta must be above 1"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}, "head_dim": 2}, "no formula for 2 rotated"),
        ({"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}}, "must have 8 entries"),
        ({"architectures": []}, "architectures names no architecture"),
        ({"architectures": ["GPT5"]}, "architecture 'GPT5' is not supported; supported: "),
        ({"max_position_embeddings": None}, "max_position_embeddings is missing"),
    ],
)
def test_refusals_name_file_and_field(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError) as caught:
        build_program(config(**fields), DType.F32)
    text = str(caught.value)
    assert text.startswith("x/config.json")
    assert message in text
    assert "\n" not in text


def test_unknown_architecture_lists_all_supported() -> None:
    with pytest.raises(ModelError, match=", ".join(supported())):
        build_program(config(architectures=["Nope"]), DType.F32)
    assert {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"} <= set(ARCHITECTURES)


def test_window_layers_of_qwen2() -> None:
    def windows(**fields: object) -> list[int | None]:
        program = build_program(ModelConfig(tiny.CASES["qwen2"] | fields, "c"), DType.F32)
        return [op.window for op in program.ops if isinstance(op, Attention)]

    assert windows() == [None] * 3
    assert windows(use_sliding_window=True, sliding_window=9, max_window_layers=2) == [None, None, 9]
    with pytest.raises(ModelError, match="layer_types holds 'odd'"):
        windows(use_sliding_window=True, layer_types=["odd"] * 3)


@pytest.mark.parametrize(
    ("fields", "window"), [({}, 4096), ({"sliding_window": None}, None), ({"sliding_window": 7}, 7)]
)
def test_window_of_mistral(fields: dict[str, object], window: int | None) -> None:
    program = build_program(config(architectures=["MistralForCausalLM"], **fields), DType.F32)
    assert {op.window for op in program.ops if isinstance(op, Attention)} == {window}


@pytest.mark.parametrize(
    ("architecture", "theta"),
    [
        ("LlamaForCausalLM", 1e4),
        ("Qwen3ForCausalLM", 1e4),
        ("SmolLM3ForCausalLM", 2e6),
        ("CohereForCausalLM", 5e5),
    ],
)
def test_base_of_rope_when_the_config_does_not_say(architecture: str, theta: float) -> None:
    program = build_program(config(architectures=[architecture], rope_theta=None), DType.F32)
    assert {op.rope.theta for op in program.ops if isinstance(op, RopeKV) and op.rope is not None} == {theta}


def test_program_of_llama() -> None:
    program = tiny.program_of(tiny.CASES["llama_tied_biased_wide_heads"])
    logits = next(op for op in program.ops if isinstance(op, Logits))
    assert logits.weight.name == "embed"  # tied: the table itself, not a copy
    qkv = next(op for op in program.ops if isinstance(op, Linear))
    assert qkv.weight.shape == ((6 + 2 * 2) * 24, 48)
    assert qkv.bias is not None and qkv.bias.shape == (240,)
    assert [op.name for op in program.ops[:5]] == [
        "embed", "layers.0.attn_norm", "layers.0.qkv", "layers.0.rope_kv", "layers.0.attn",
    ]  # fmt: skip
    assert kv_bytes_per_token(program) == 4 * 3 * 2 * 2 * 24


def test_old_and_new_rope_fields_mean_the_same() -> None:
    old = config(rope_theta=500.0, rope_scaling={"type": "linear", "factor": 2.0})
    new = config(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0})
    assert read_rope(old, 16) == read_rope(new, 16)
    by_layer = config(rope_parameters={"sliding": {"rope_type": "default", "rope_theta": 9.0}})
    assert read_rope(by_layer, 16, layer_type="sliding").theta == 9.0


def test_yarn_and_longrope_attention_factors() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    assert read_rope(config(rope_scaling=yarn), 16).attention_factor == pytest.approx(0.1 * math.log(4) + 1)
    given = yarn | {"attention_factor": 0.5}
    assert read_rope(config(rope_scaling=given), 16).attention_factor == 0.5
    long = {"rope_type": "longrope", "long_factor": [2.0] * 8, "short_factor": [1.0] * 8}
    section = long | {"original_max_position_embeddings": 32}  # of 128: a factor of 4
    expected = math.sqrt(1 + math.log(4) / math.log(32))
    assert read_rope(config(rope_scaling=section), 16).attention_factor == pytest.approx(expected)


@pytest.mark.parametrize(
    ("scaling", "positions"),
    [
        (None, 128),
        ({"type": "linear", "factor": 2.0}, 256),
        ({"type": "dynamic", "factor": 2.5}, 320),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100}, 400),
        ({"rope_type": "llama3", "factor": 8.0}, 128),
    ],
)
def test_max_positions(scaling: object, positions: int) -> None:
    assert max_positions(config(rope_scaling=scaling)) == positions


def test_token_ids_and_dtype() -> None:
    assert config(eos_token_id=[3, 4]).eos_token_ids == (3, 4)
    assert config(eos_token_id=3).eos_token_ids == (3,)
    assert config().eos_token_ids == ()
    with pytest.raises(ModelError, match="eos_token_id"):
        token_ids(config(eos_token_id=["a"]), "eos_token_id")


def test_every_rope_in_a_program_is_one_object_in_the_tables() -> None:
    ropes = {op.rope for op in tiny.program_of(LLAMA).ops if isinstance(op, RopeKV)}
    assert len(ropes) == 1
