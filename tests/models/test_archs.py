"""Every architecture on tiny random checkpoints, against Transformers (live comparisons: marker oracle)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from rvllm import LLM, SamplingParams
from rvllm.config import EngineConfig
from rvllm.engine.core import EngineCore
from rvllm.errors import ModelError
from rvllm.models.config import ModelConfig
from rvllm.models.registry import build_program
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Part, Program
from rvllm.weights.open import open_checkpoint
from rvllm.weights.packing import pack, row_order
from support.models import archs_gguf, archs_moe_gguf, nemotron_gguf
from support.models import archs_moe_tiny as moe
from support.models import archs_tiny as tiny
from support.models import nemotron_tiny as nemotron
from support.models.tiny import generate
from support.models.tiny import logits_of as all_logits

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "archs"
CASES = tiny.CASES | moe.CASES | nemotron.CASES
SMALL = [name for name, case in CASES.items() if "Phi3Small" in case.config["architectures"][0]]
KNOWN = [name for name in CASES if name not in SMALL]  # to Transformers, and to llama.cpp
CHUNKS = [(5, 1, 64, 3, 40, 24)]
CHUNKS_OF_STATES = [*CHUNKS, (16,) * 8 + (9,), (1,) * 137, (130, 7)]


def saved(name: str, path: Path) -> Path:
    config = CASES[name].config
    return tiny.save(path, config, tiny.random_tensors(name, config))


def logits_of(path: Path, prompt: np.ndarray, max_model_len: int = 256) -> np.ndarray:
    """Logits of the whole prompt in one step, by a backend of its own."""
    backend = tiny.load(path, max_model_len)
    logits = all_logits(backend, prompt)
    backend.close()
    return logits


def program_of(config: dict[str, Any]) -> Program:
    return build_program(ModelConfig(config, "config.json"), DType.F32)


def agree(ours: np.ndarray, theirs: np.ndarray) -> None:
    hidden = np.isneginf(theirs)
    assert np.array_equal(np.isneginf(ours), hidden)
    assert np.abs(theirs[~hidden]).max() > 1.0  # a comparison of near-zeros would show nothing
    np.testing.assert_allclose(ours[~hidden], theirs[~hidden], atol=1e-4, rtol=0)


@pytest.mark.oracle
@pytest.mark.parametrize("name", KNOWN)
def test_equals_transformers(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    case, prompt = CASES[name], tiny.prompt_of(name)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        saved(name, tmp_path), dtype=torch.float32, attn_implementation="eager",
        experts_implementation="eager", output_loading_info=True,
    )  # fmt: skip
    assert not any(report.values()), report
    model.eval()
    backend = tiny.load(tmp_path, case.max_model_len)
    ours = all_logits(backend, prompt)
    tokens = torch.from_numpy(prompt)[None].long()
    with torch.no_grad():
        agree(ours, model(tokens, use_cache=False).logits[0].numpy())
        for _ in range(tiny.GREEDY):
            best = model(tokens, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, best], dim=1)
    assert generate(backend, prompt, tiny.GREEDY) == tokens[0, len(prompt) :].tolist()
    backend.close()
    model.save_pretrained(tmp_path / "saved", max_shard_size="40KB")  # its own names, config and shards
    assert np.array_equal(ours, logits_of(tmp_path / "saved", prompt, case.max_model_len))


@pytest.mark.oracle
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("served", [256, 64])
def test_equals_the_published_definition(name: str, served: int, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from support.models.oracle_phi3small import Phi3Small

    case = CASES[name]
    prompt = tiny.prompt_of(name, min(tiny.PROMPT, served - tiny.GREEDY))
    model = Phi3Small(case.config, tiny.random_tensors(name, case.config), served)
    backend = tiny.load(saved(name, tmp_path), served)
    agree(all_logits(backend, prompt), model.logits(prompt))
    assert generate(backend, prompt, tiny.GREEDY) == model.greedy(prompt, tiny.GREEDY)
    backend.close()


@pytest.mark.oracle
def test_text_half_of_gemma3_with_images(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    text = tiny.CASES["gemma3"].config | {"final_logit_softcapping": None}
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(tmp_path)
    prompt = tiny.prompt_of("gemma3")
    with torch.no_grad():
        theirs = model(input_ids=torch.from_numpy(prompt)[None].long()).logits[0].numpy()
    agree(logits_of(tmp_path, prompt), theirs)


@pytest.mark.parametrize("name", CASES)
def test_equals_golden_file_in_any_chunks(name: str, tmp_path: Path) -> None:
    case, prompt = CASES[name], tiny.prompt_of(name)
    tensors = tiny.random_tensors(name, case.config)
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    assert tiny.digest(tensors) == golden["weights_sha256"], "other weights: run scripts/make_golden_archs.py"
    backend = tiny.load(tiny.save(tmp_path, case.config, tensors), case.max_model_len)
    ours = all_logits(backend, prompt)
    agree(ours[list(tiny.GOLDEN_ROWS)], np.array(golden["logits"], np.float32))
    for chunks in CHUNKS_OF_STATES if name in nemotron.CASES else CHUNKS:
        assert np.array_equal(ours, all_logits(backend, prompt, chunks)), chunks
    assert generate(backend, prompt, tiny.GREEDY) == golden["greedy"]
    backend.close()


@pytest.mark.parametrize("name", CASES)
def test_batch_mates_change_no_bit(name: str, tmp_path: Path) -> None:
    backend = tiny.load(saved(name, tmp_path), CASES[name].max_model_len)
    long = 129 if name in nemotron.CASES else 131  # its last token is the first of a chunk of states
    prompts = [tiny.prompt_of(f"{name} {i}", length) for i, length in enumerate((35, long, 7))]
    alone = [all_logits(backend, prompt) for prompt in prompts]
    first = tiny.step_logits(backend, [p[:-1] for p in prompts[:2]], [0, 0])
    # two sequences decode their last token while the third one's prompt joins them
    second = tiny.step_logits(backend, [prompts[0][-1:], prompts[1][-1:], prompts[2]], [34, long - 1, 0])
    backend.close()
    for s, rows in enumerate([*map(np.concatenate, zip(first, second[:2], strict=True)), second[2]]):
        assert np.array_equal(rows, alone[s]), f"sequence {s}"


TIGHT = [(name, 3, blocks) for name in ("mixtral_window", "deepseek_v2", "phi3small") for blocks in (40, 14)]


@pytest.mark.parametrize(("name", "seqs", "num_blocks"), [*((name, 2, 40) for name in tiny.CASES), *TIGHT])
def test_engine_gives_the_golden_tokens(name: str, seqs: int, num_blocks: int, tmp_path: Path) -> None:
    """Chunked prompts, batch-mates, a prompt whose blocks are cached; in 14 blocks hardly two fit."""
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    prompts = [tiny.prompt_of(name), tiny.prompt_of(f"{name} other", 30), tiny.prompt_of(name)]
    with LLM(
        str(saved(name, tmp_path)), device="cpu", skip_tokenizer_init=True, max_num_batched_tokens=50,
        max_model_len=min(CASES[name].max_model_len, 14 * 16), max_num_seqs=seqs, num_blocks=num_blocks,
        threads=1,
    ) as llm:  # fmt: skip
        params = SamplingParams(temperature=0.0, max_tokens=tiny.GREEDY, ignore_eos=True)
        out = llm.generate([{"prompt_token_ids": p.tolist()} for p in prompts], params, use_tqdm=False)
    assert list(out[0].outputs[0].token_ids) == golden["greedy"]
    assert list(out[2].outputs[0].token_ids) == golden["greedy"]


@pytest.mark.parametrize("name", CASES)
def test_shards_change_no_bit(name: str, tmp_path: Path) -> None:
    case, prompt = CASES[name], tiny.prompt_of(name, 61)
    tensors = tiny.random_tensors(name, case.config)
    paths = [tiny.save(tmp_path / str(shards), case.config, tensors, shards) for shards in (1, 3)]
    assert np.array_equal(*(logits_of(path, prompt, case.max_model_len) for path in paths))


# What llama.cpp's files have no room for: biases, activations and untied heads where its models never have
# them, Gemma 2 without caps, another scale of Gemma's queries, Qwen3's biases, windows and shares that are
# not renormalised, dense layers between sparse ones, two different mscales, halves instead of pairs, the
# least step of Mamba-2, and plain MLPs beside experts.
IN_GGUF: dict[str, dict[str, Any]] = {
    "cohere_qk_norm": {"attention_bias": False, "tie_word_embeddings": True},
    "cohere2_layer_types": {"attention_bias": False, "tie_word_embeddings": True},
    "gpt_neox_sequential": {"hidden_act": "gelu"},
    "gemma_bias": {"attention_bias": False, "tie_word_embeddings": True},
    "gemma2": {"query_pre_attn_scalar": 20},
    "gemma2_no_caps": {
        "attention_bias": False, "tie_word_embeddings": True,
        "attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0,
    },
    "gemma3": {"query_pre_attn_scalar": 20},
    "gemma3_old": {"attention_bias": False},
    "smollm3_window": {
        "no_rope_layers": None, "use_sliding_window": False, "rope_theta": 300.0, "rope_parameters": None,
    },
    "qwen3_window": {"attention_bias": False, "use_sliding_window": False},
    "mixtral_window": {"hidden_act": "silu"},
    "qwen3_moe_some": {
        "attention_bias": False, "use_sliding_window": False, "sliding_window": None, "norm_topk_prob": True,
        "decoder_sparse_step": 1, "mlp_only_layers": [],
    },
    "deepseek_v2": {
        "attention_bias": False, "mlp_bias": False,
        "rope_scaling": {
            "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "mscale": 0.4,
            "mscale_all_dim": 0.4,
        },
    },
    "deepseek_v3_halves": {"attention_bias": False, "rope_interleave": True},
    "nemotron_h_moe": {"time_step_min": 0.001},
    "nemotron_h_latent": {"layers_block_type": ["mamba", "moe", "attention", "moe"]},
}  # fmt: skip


def write_gguf(path: Path, name: str, config: dict[str, Any], **how: Any) -> Path:
    """The case's weights in the layout of llama.cpp's converter."""
    write: Callable[..., Path] = archs_gguf.write
    if name not in tiny.CASES:
        write = archs_moe_gguf.write if name in moe.CASES else nemotron_gguf.write
    return write(path, config, tiny.random_tensors(name, config), **how)


@pytest.mark.parametrize(
    ("name", "how"),
    [(name, {}) for name in KNOWN] + [(name, {"apart": False}) for name in KNOWN if "deepseek" in name],
    ids=str,
)
def test_gguf_equals_safetensors(name: str, how: dict[str, bool], tmp_path: Path) -> None:
    """apart: keys and values of latent attention as two tensors, as since 2025; before they were one."""
    config, limit = CASES[name].config | IN_GGUF.get(name, {}), CASES[name].max_model_len
    prompt = tiny.prompt_of(name, 61)
    ours = logits_of(tiny.save(tmp_path, config, tiny.random_tensors(name, config)), prompt, limit)
    theirs = logits_of(write_gguf(tmp_path / "model.gguf", name, config, **how), prompt, limit)
    # (w + 1) - 1, LongRoPE's factors in float32, and decays held as -exp(A_log)
    rounds = "gemma" in name or name in ("phi3_long", "phi3_short", *nemotron.CASES)
    np.testing.assert_allclose(theirs, ours, atol=2e-5 if rounds else 0, rtol=0)


def cut(part: Part, tensor: tiny.F32) -> tiny.F32:
    """What a part is of its tensor: all, or rows or columns of a shared MLP that is cut into experts."""
    if part.layout == "columns":
        return tensor[:, part.columns[0] : sum(part.columns)]
    return tensor[part.rows[0] : sum(part.rows)] if part.layout == "head_rows" else tensor


@pytest.mark.parametrize("name", nemotron.CASES)
def test_layers_with_states_are_read_from_gguf(name: str, tmp_path: Path) -> None:
    config = CASES[name].config | IN_GGUF.get(name, {})
    tensors = tiny.random_tensors(name, config)
    file = write_gguf(tmp_path / "model.gguf", name, config)
    drawn = []
    for path in (tiny.save(tmp_path, config, tensors), file):
        backend = tiny.load(path)
        drawn.append(generate(backend, tiny.prompt_of(name, 45), 8))
        backend.close()
    assert drawn[0] == drawn[1]
    checkpoint = open_checkpoint(file)
    for weight in build_program(ModelConfig(checkpoint.config, "gguf"), DType.F32).weights:
        wanted = np.concatenate([cut(p, tensors[p.source]).reshape(-1) for p in weight.parts])
        rounded = weight.parts[0].source.endswith("A_log")
        found = pack(weight, checkpoint, DType.F32).reshape(-1)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6 if rounded else 0, err_msg=weight.name)


def test_fused_rows_in_wanted_order_stay_views_of_the_file(tmp_path: Path) -> None:
    """GPT-NeoX's GGUF rows are regrouped for Transformers' names and back: no copy is needed."""
    case = tiny.CASES["gpt_neox"]
    tensors = tiny.random_tensors(case.name, case.config)
    checkpoint = open_checkpoint(archs_gguf.write(tmp_path / "model.gguf", case.config, tensors))
    part = next(p for p in tiny.parts_of(case.config) if p.source.endswith("query_key_value.weight"))
    assert row_order(part, checkpoint.tensors[part.source]) is None


def test_quantised_stacks_of_experts(tmp_path: Path) -> None:
    config = CASES["mixtral"].config | {"hidden_size": 64, "intermediate_size": 96}
    tensors = tiny.random_tensors("mixtral", config)
    kind = gguf.GGMLQuantizationType.Q8_0
    checkpoint = open_checkpoint(
        archs_moe_gguf.write(tmp_path / "model.gguf", config, tensors, quantised=kind)
    )
    for weight in program_of(config).weights:
        if weight.role == "stack":
            wanted = np.concatenate(
                [gguf.dequantize(gguf.quantize(tensors[p.source], kind), kind) for p in weight.parts]
            ).reshape(weight.shape)
            assert np.array_equal(pack(weight, checkpoint, DType.F32), wanted)


def test_experts_in_tensors_of_their_own(tmp_path: Path) -> None:
    """Early files of Mixtral have blk.N.ffn_up.E instead of stacks."""
    config = CASES["mixtral"].config
    tensors = tiny.random_tensors("mixtral", config)
    path = archs_moe_gguf.write(tmp_path / "model.gguf", config, tensors)
    single = tmp_path / "single.gguf"
    writer = gguf.GGUFWriter(str(single), "llama")
    for key, entry in gguf.GGUFReader(path).fields.items():
        if key.startswith("llama."):
            writer.add_key_value(key, entry.contents(), entry.types[0])
    for tensor in gguf.GGUFReader(path).tensors:
        if "_exps" not in tensor.name:
            writer.add_tensor(tensor.name, np.array(tensor.data))
            continue
        for expert, matrix in enumerate(tensor.data):
            writer.add_tensor(tensor.name.replace("_exps", f".{expert}"), np.array(matrix))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    stacked, apart = open_checkpoint(path), open_checkpoint(single)
    for weight in program_of(config).weights:
        assert np.array_equal(pack(weight, stacked, DType.F32), pack(weight, apart, DType.F32))


@pytest.mark.parametrize(
    ("name", "tensor", "wrong", "message"),
    [
        ("gpt_neox", "blk.1.attn_qkv.bias", (145,), ""),
        ("phi3_long", "rope_factors_long.weight", (9,), ""),
        ("stablelm_qk_norm", "blk.0.attn_q_norm.weight", (48,), ""),
        ("stablelm_qk_norm", "blk.0.attn_q_norm.weight", (2, 16), ""),
        ("mixtral", "blk.1.ffn_up_exps.weight", (7, 56, 48), ""),
        ("mixtral", "blk.1.ffn_up_exps.weight", (8, 55, 48), ""),
        ("mixtral", "blk.0.ffn_down_exps.weight", (8, 48), ""),
        ("deepseek_v2_lite", "blk.0.attn_k_b.weight", (4, 16, 24), ""),
        ("deepseek_v2_lite", "blk.0.attn_v_b.weight", (3, 12, 24), ""),
        ("deepseek_v3", "blk.1.exp_probs_b.bias", (11,), ""),
        ("nemotron_h", "blk.0.ssm_a", (6, 1), "must hold negative numbers"),
        ("nemotron_h", "blk.0.ssm_norm.weight", (2, 23), "norm.weight has shape"),
        ("nemotron_h", "blk.0.ssm_d", (7, 1), "mixer.D has shape"),
    ],
)
def test_wrong_gguf_tensors_are_refused_in_one_line(
    name: str, tensor: str, wrong: tuple[int, ...], message: str, tmp_path: Path
) -> None:
    instead = {tensor: np.ones(wrong, np.float32)}
    path = write_gguf(tmp_path / "x.gguf", name, CASES[name].config, instead=instead)
    with pytest.raises(ModelError) as caught:
        EngineCore.from_config(EngineConfig(model=str(path), device="cpu"))
    text = str(caught.value)
    assert "x.gguf" in text and message in text and "\n" not in text
