"""Mixtures, latent and block-sparse attention on tiny random checkpoints (live ones: marker oracle)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from rvllm import LLM, SamplingParams
from rvllm.errors import ModelError
from rvllm.models.config import ModelConfig
from rvllm.models.registry import build_program
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Program
from rvllm.weights.open import open_checkpoint
from rvllm.weights.packing import check_weights, pack
from support.models import archs_moe_gguf
from support.models import archs_moe_tiny as moe
from support.models import archs_tiny as tiny

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "archs"
CHUNKS = (5, 1, 64, 3, 40, 24)
SMALL = [name for name, case in moe.CASES.items() if "Phi3Small" in case.config["architectures"][0]]
KNOWN = [name for name in moe.CASES if name not in SMALL]  # to Transformers, and to llama.cpp


def saved(name: str, path: Path) -> Path:
    case = moe.CASES[name]
    return tiny.save(path, case.config, tiny.random_tensors(name, case.config))


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
    case = moe.CASES[name]
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        saved(name, tmp_path), dtype=torch.float32, attn_implementation="eager",
        experts_implementation="eager", output_loading_info=True,
    )  # fmt: skip
    assert not any(report.values()), report
    model.eval()
    backend = tiny.load(tmp_path, case.max_model_len)
    prompt = tiny.prompt_of(name)
    ours = tiny.all_logits(backend, prompt, (len(prompt),))
    tokens = torch.from_numpy(prompt)[None].long()
    with torch.no_grad():
        agree(ours, model(tokens).logits[0].numpy())
        for _ in range(tiny.GREEDY):
            best = model(tokens).logits[:, -1].argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, best], dim=1)
    assert tiny.greedy(backend, prompt, tiny.GREEDY) == tokens[0, len(prompt) :].tolist()
    backend.close()

    model.save_pretrained(tmp_path / "saved", max_shard_size="40KB")  # its own names, config and shards
    again = tiny.load(tmp_path / "saved", case.max_model_len)
    assert np.array_equal(ours, tiny.all_logits(again, prompt, (len(prompt),)))
    again.close()


@pytest.mark.oracle
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("served", [256, 64])
def test_equals_the_published_definition(name: str, served: int, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from support.models.oracle_phi3small import Phi3Small

    case = moe.CASES[name]
    prompt = tiny.prompt_of(name, min(tiny.PROMPT, served - tiny.GREEDY))
    model = Phi3Small(case.config, tiny.random_tensors(name, case.config), served)
    backend = tiny.load(saved(name, tmp_path), served)
    agree(tiny.all_logits(backend, prompt, (len(prompt),)), model.logits(prompt))
    assert tiny.greedy(backend, prompt, tiny.GREEDY) == model.greedy(prompt, tiny.GREEDY)
    backend.close()


@pytest.mark.parametrize("name", moe.CASES)
def test_equals_golden_file(name: str, tmp_path: Path) -> None:
    case = moe.CASES[name]
    tensors = tiny.random_tensors(name, case.config)
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    assert tiny.digest(tensors) == golden["weights_sha256"], "other weights: run scripts/make_golden_archs.py"
    backend = tiny.load(tiny.save(tmp_path, case.config, tensors), case.max_model_len)
    prompt = tiny.prompt_of(name)
    ours = tiny.all_logits(backend, prompt, (len(prompt),))
    agree(ours[list(tiny.GOLDEN_ROWS)], np.array(golden["logits"], np.float32))
    assert np.array_equal(ours, tiny.all_logits(backend, prompt, CHUNKS))
    assert tiny.greedy(backend, prompt, tiny.GREEDY) == golden["greedy"]
    backend.close()


@pytest.mark.parametrize("name", moe.CASES)
def test_batch_mates_change_no_bit(name: str, tmp_path: Path) -> None:
    backend = tiny.load(saved(name, tmp_path), moe.CASES[name].max_model_len)
    prompts = [tiny.prompt_of(f"{name} {i}", length) for i, length in enumerate((35, 131, 7))]
    alone = [tiny.all_logits(backend, prompt, (len(prompt),)) for prompt in prompts]
    first = tiny.step_logits(backend, [p[:-1] for p in prompts[:2]], [0, 0])
    # two sequences decode their last token while the third one's prompt joins them
    second = tiny.step_logits(backend, [prompts[0][-1:], prompts[1][-1:], prompts[2]], [34, 130, 0])
    backend.close()
    for s, rows in enumerate([*map(np.concatenate, zip(first, second[:2], strict=True)), second[2]]):
        assert np.array_equal(rows, alone[s]), f"sequence {s}"


@pytest.mark.parametrize("name", ["mixtral_window", "deepseek_v2", "phi3small"])
@pytest.mark.parametrize("num_blocks", [40, 14])
def test_the_engine_draws_the_same_tokens(name: str, num_blocks: int, tmp_path: Path) -> None:
    """Prompts come in chunks and share a prefix; 14 blocks hold one long sequence and little else."""
    saved(name, tmp_path)
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    prompts = [tiny.prompt_of(name), tiny.prompt_of(f"{name} other", 30), tiny.prompt_of(name)]
    with LLM(
        str(tmp_path), device="cpu", skip_tokenizer_init=True, max_model_len=200, max_num_seqs=3,
        max_num_batched_tokens=50, num_blocks=num_blocks, threads=1,
    ) as llm:  # fmt: skip
        params = SamplingParams(temperature=0.0, max_tokens=tiny.GREEDY, ignore_eos=True)
        out = llm.generate([{"prompt_token_ids": p.tolist()} for p in prompts], params, use_tqdm=False)
    assert list(out[0].outputs[0].token_ids) == golden["greedy"]
    assert list(out[2].outputs[0].token_ids) == golden["greedy"]


@pytest.mark.parametrize("name", moe.CASES)
def test_shards_change_no_bit(name: str, tmp_path: Path) -> None:
    case = moe.CASES[name]
    prompt, tensors = tiny.prompt_of(name, 61), tiny.random_tensors(name, case.config)
    logits = []
    for shards in (1, 3):
        backend = tiny.load(tiny.save(tmp_path / str(shards), case.config, tensors, shards))
        logits.append(tiny.all_logits(backend, prompt, (len(prompt),)))
        backend.close()
    assert np.array_equal(*logits)


# What llama.cpp's files have no room for: other activations, biases, dense layers between sparse ones,
# Qwen3-MoE's windows and shares that are not renormalised, two different mscales, halves instead of pairs.
IN_GGUF: dict[str, dict[str, Any]] = {
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
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "apart"),
    [(name, True) for name in KNOWN] + [(name, False) for name in KNOWN if "deepseek" in name],
)
def test_gguf_equals_safetensors(name: str, apart: bool, tmp_path: Path) -> None:
    """apart: keys and values of latent attention as two tensors, as since 2025; before they were one."""
    config = moe.CASES[name].config | IN_GGUF.get(name, {})
    tensors = tiny.random_tensors(name, config)
    prompt = tiny.prompt_of(name, 61)
    logits = []
    for path in (
        tiny.save(tmp_path / "one", config, tensors),
        archs_moe_gguf.write(tmp_path / "model.gguf", config, tensors, apart=apart),
    ):
        backend = tiny.load(path)
        logits.append(tiny.all_logits(backend, prompt, (len(prompt),)))
        backend.close()
    assert np.array_equal(*logits)


def test_quantised_stacks_of_experts(tmp_path: Path) -> None:
    config = moe.CASES["mixtral"].config | {"hidden_size": 64, "intermediate_size": 96}
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
    config = moe.CASES["mixtral"].config
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
    ("name", "tensor", "shape"),
    [
        ("mixtral", "blk.1.ffn_up_exps.weight", (7, 56, 48)),
        ("mixtral", "blk.1.ffn_up_exps.weight", (8, 55, 48)),
        ("mixtral", "blk.0.ffn_down_exps.weight", (8, 48)),
        ("deepseek_v2_lite", "blk.0.attn_k_b.weight", (4, 16, 24)),
        ("deepseek_v2_lite", "blk.0.attn_v_b.weight", (3, 12, 24)),
        ("deepseek_v3", "blk.1.exp_probs_b.bias", (11,)),
    ],
)
def test_gguf_tensors_of_a_wrong_shape_are_refused(
    name: str, tensor: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    config = moe.CASES[name].config
    instead = {tensor: np.ones(shape, np.float32)}
    path = tmp_path / "x.gguf"
    archs_moe_gguf.write(path, config, tiny.random_tensors(name, config), instead=instead)
    with pytest.raises(ModelError) as caught:
        check_weights(program_of(config), open_checkpoint(path))
    assert "x.gguf" in str(caught.value) and "\n" not in str(caught.value)
