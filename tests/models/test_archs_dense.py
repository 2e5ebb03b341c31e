"""Dense architectures on tiny random checkpoints, against Transformers (marker oracle)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rvllm import LLM, SamplingParams
from rvllm.errors import ModelError
from rvllm.weights.open import open_checkpoint
from rvllm.weights.packing import row_order
from support.models import archs_gguf
from support.models import archs_tiny as tiny

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "archs"
CHUNKS = (5, 1, 64, 3, 40, 24)


def oracle(path: Path) -> Any:
    """Transformers' model with the checkpoint's weights; refuses missing or unused tensors."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    transformers.logging.set_verbosity_error()
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"], report
    assert not report["unexpected_keys"], report
    assert not report["mismatched_keys"], report
    return model.eval()


@pytest.mark.oracle
@pytest.mark.parametrize("name", tiny.CASES)
def test_equals_transformers(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    case = tiny.CASES[name]
    tiny.save(tmp_path, case.config, tiny.random_tensors(name, case.config))
    backend = tiny.load(tmp_path, case.max_model_len)
    prompt = tiny.prompt_of(name)
    model = oracle(tmp_path)

    ours = tiny.all_logits(backend, prompt, (len(prompt),))
    with torch.no_grad():
        theirs = model(torch.from_numpy(prompt)[None].long()).logits[0].numpy()
    assert np.abs(theirs).max() > 1.0  # a comparison of near-zeros would show nothing
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)

    pieces = tiny.all_logits(backend, prompt, CHUNKS)
    assert np.array_equal(ours, pieces)

    model.save_pretrained(tmp_path / "saved", max_shard_size="40KB")  # its own names, config and shards
    again = tiny.load(tmp_path / "saved", case.max_model_len)
    assert np.array_equal(ours, tiny.all_logits(again, prompt, (len(prompt),)))
    again.close()

    tokens = torch.from_numpy(prompt)[None].long()
    with torch.no_grad():
        for _ in range(tiny.GREEDY):
            best = model(tokens).logits[:, -1].argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, best], dim=1)
    assert tiny.greedy(backend, prompt, tiny.GREEDY) == tokens[0, len(prompt) :].tolist()
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
    backend = tiny.load(tmp_path)
    prompt = tiny.prompt_of("gemma3")
    with torch.no_grad():
        theirs = model(input_ids=torch.from_numpy(prompt)[None].long()).logits[0].numpy()
    assert np.abs(theirs).max() > 1.0
    np.testing.assert_allclose(
        tiny.all_logits(backend, prompt, (len(prompt),)), theirs, atol=1e-4, rtol=0
    )  # fmt: skip
    backend.close()


@pytest.mark.parametrize("name", tiny.CASES)
def test_equals_golden_file(name: str, tmp_path: Path) -> None:
    case = tiny.CASES[name]
    tensors = tiny.random_tensors(name, case.config)
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    assert tiny.digest(tensors) == golden["weights_sha256"], "other weights: run scripts/make_golden_archs.py"
    backend = tiny.load(tiny.save(tmp_path, case.config, tensors), case.max_model_len)
    prompt = tiny.prompt_of(name)

    ours = tiny.all_logits(backend, prompt, (len(prompt),))
    wanted = np.array(golden["logits"], np.float32)
    np.testing.assert_allclose(ours[list(tiny.GOLDEN_ROWS)], wanted, atol=1e-4, rtol=0)
    assert np.array_equal(ours, tiny.all_logits(backend, prompt, CHUNKS))
    assert tiny.greedy(backend, prompt, tiny.GREEDY) == golden["greedy"]
    backend.close()


@pytest.mark.parametrize("name", tiny.CASES)
def test_batch_mates_change_no_bit(name: str, tmp_path: Path) -> None:
    case = tiny.CASES[name]
    path = tiny.save(tmp_path, case.config, tiny.random_tensors(name, case.config))
    backend = tiny.load(path, case.max_model_len)
    prompts = [tiny.prompt_of(f"{name} {i}", length) for i, length in enumerate((35, 131, 7))]
    alone = [tiny.all_logits(backend, prompt, (len(prompt),)) for prompt in prompts]
    first = tiny.step_logits(backend, [p[:-1] for p in prompts[:2]], [0, 0])
    # two sequences decode their last token while the third one's prompt joins them
    second = tiny.step_logits(backend, [prompts[0][-1:], prompts[1][-1:], prompts[2]], [34, 130, 0])
    backend.close()
    for s, rows in enumerate([*map(np.concatenate, zip(first, second[:2], strict=True)), second[2]]):
        assert np.array_equal(rows, alone[s]), f"sequence {s}"


@pytest.mark.parametrize("name", tiny.CASES)
def test_engine_gives_the_golden_tokens(name: str, tmp_path: Path) -> None:
    """Through the whole engine: chunked prompts, batch-mates, and a prompt whose blocks are cached."""
    case = tiny.CASES[name]
    tiny.save(tmp_path, case.config, tiny.random_tensors(name, case.config))
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    prompts = [tiny.prompt_of(name), tiny.prompt_of(f"{name} other", 30), tiny.prompt_of(name)]
    with LLM(
        str(tmp_path), device="cpu", skip_tokenizer_init=True, max_model_len=case.max_model_len,
        max_num_seqs=2, max_num_batched_tokens=50, num_blocks=40, threads=1,
    ) as llm:  # fmt: skip
        params = SamplingParams(temperature=0.0, max_tokens=tiny.GREEDY, ignore_eos=True)
        out = llm.generate([{"prompt_token_ids": p.tolist()} for p in prompts], params, use_tqdm=False)
    assert list(out[0].outputs[0].token_ids) == golden["greedy"]
    assert list(out[2].outputs[0].token_ids) == golden["greedy"]


# What llama.cpp's files have no room for: biases and untied heads where its models never have them, Gemma 2
# without caps, another scale of Gemma's queries or activation of GPT-NeoX, Qwen3's biases and windows.
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
}  # fmt: skip


@pytest.mark.parametrize("name", tiny.CASES)
def test_gguf_equals_safetensors(name: str, tmp_path: Path) -> None:
    case = tiny.CASES[name]
    config = case.config | IN_GGUF.get(name, {})
    tensors = tiny.random_tensors(name, config)
    prompt = tiny.prompt_of(name, 61)
    logits = []
    for path in (
        tiny.save(tmp_path / "one", config, tensors),
        tiny.save(tmp_path / "sharded", config, tensors, shards=3),
        archs_gguf.write(tmp_path / "model.gguf", config, tensors),
    ):
        backend = tiny.load(path, case.max_model_len)
        logits.append(tiny.all_logits(backend, prompt, (len(prompt),)))
        backend.close()
    assert np.array_equal(logits[0], logits[1])
    np.testing.assert_allclose(logits[2], logits[0], atol=2e-5, rtol=0)  # (w + 1) - 1 rounds


def test_fused_rows_in_wanted_order_stay_views_of_the_file(tmp_path: Path) -> None:
    """GPT-NeoX's GGUF rows are regrouped for Transformers' names and back: no copy is needed."""
    case = tiny.CASES["gpt_neox"]
    tensors = tiny.random_tensors(case.name, case.config)
    checkpoint = open_checkpoint(archs_gguf.write(tmp_path / "model.gguf", case.config, tensors))
    part = next(p for p in tiny.parts_of(case.config) if p.source.endswith("query_key_value.weight"))
    assert row_order(part, checkpoint.tensors[part.source]) is None


@pytest.mark.parametrize(
    ("name", "tensor", "shape"),
    [
        ("gpt_neox", "blk.1.attn_qkv.bias", (145,)),
        ("phi3_long", "rope_factors_long.weight", (9,)),
        ("stablelm_qk_norm", "blk.0.attn_q_norm.weight", (48,)),
        ("stablelm_qk_norm", "blk.0.attn_q_norm.weight", (2, 16)),
    ],
)
def test_gguf_tensors_of_a_wrong_shape_are_refused(
    name: str, tensor: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    case = tiny.CASES[name]
    wrong = {tensor: np.ones(shape, np.float32)}
    path = archs_gguf.write(
        tmp_path / "x.gguf", case.config, tiny.random_tensors(name, case.config), wrong
    )  # fmt: skip
    with pytest.raises(ModelError) as caught:
        tiny.load(path, case.max_model_len)
    assert "x.gguf" in str(caught.value) and "\n" not in str(caught.value)
