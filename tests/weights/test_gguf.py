"""GGUF files: what is read, how it is named, and that damaged ones are refused in one line."""

import os
import re
import struct
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from rvllm.errors import ModelError
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Part, Program, Weight
from rvllm.weights.checkpoint import TensorType
from rvllm.weights.gguf.archs import LAYER_NAMES
from rvllm.weights.gguf.config import KNOWN
from rvllm.weights.gguf.container import Strings, read_gguf
from rvllm.weights.open import open_checkpoint
from rvllm.weights.packing import check_weights, pack
from support.models.fetched import model_path
from support.weights.model_files import (
    LLAMA,
    blocks,
    gguf_bytes,
    gguf_entry,
    gguf_string,
    gguf_value,
    llama_tensors,
    refused,
    write_gguf,
)


def test_reads_what_the_gguf_package_writes(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_uint32("a.u32", 7)
    writer.add_float64("a.f64", 0.25)
    writer.add_bool("a.bool", True)
    writer.add_string("a.text", "grüße")
    writer.add_array("a.texts", ["x", "", "日本"])
    writer.add_array("a.numbers", [1, -2, 3])
    numbers = np.arange(64, dtype=np.float32).reshape(2, 32)
    writer.add_tensor("first", numbers)
    writer.add_tensor("second", numbers.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    got = read_gguf(path)
    assert got.version == 3
    assert got.metadata["a.u32"] == 7 and got.metadata["a.f64"] == 0.25
    assert got.metadata["a.bool"] is True and got.metadata["a.text"] == "grüße"
    assert list(got.metadata["a.texts"]) == ["x", "", "日本"]
    assert got.metadata["a.texts"][2] == "日本" and got.metadata["a.texts"][:2] == ["x", ""]
    assert got.metadata["a.numbers"].tolist() == [1, -2, 3]
    assert got.tensors["first"].shape == (2, 32) and got.tensors["second"].type is TensorType.F16
    first = got.tensors["first"]
    stored = got.file.bytes[first.offset : first.offset + first.nbytes].view(np.float32)
    np.testing.assert_array_equal(stored.reshape(2, 32), numbers)


def test_what_ends_an_answer(tmp_path: Path) -> None:
    """What the file names, and tokens spelled so whatever their type, as llama.cpp has it."""
    words = ["<|endoftext|>", "<|im_end|>", "<|end|>", "a"]
    known: dict[str, Any] = {
        **LLAMA,
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.token_type": np.array([3, 3, 1, 3], np.int32),
        "tokenizer.ggml.eos_token_id": 1,
    }

    def ends(**changes: Any) -> Any:
        values = {**known, **{f"tokenizer.ggml.{name}": value for name, value in changes.items()}}
        checkpoint = open_checkpoint(write_gguf(tmp_path / "ends.gguf", values))
        return checkpoint.generation_config["eos_token_id"]

    assert ends(eot_token_id=3) == [1, 3, 0, 2]
    for kinds in (7, "text", np.array([3, 3], np.int32), np.array([1, 4, 1, 1], np.int32)):
        assert ends(token_type=kinds, eot_token_id=1) == [1, 0, 2]
    assert ends(tokens=["<|return|>", "<|call|>", "<|end|>", "a"], eot_token_id=0) == [1, 0]
    assert ends(tokens=["</s>", "<|tool_response>", "<turn|>", "a"], eot_token_id=1) == [1, 2]
    html = np.array([1, 3, 1, 1], np.int32)  # a plain </s> is a tag that code models write
    assert ends(tokens=["</s>", "<|im_end|>", "a", "b"], token_type=html, eot_token_id=1) == [1]
    assert ends(tokens=["<|fim_pad|>", "<|file_sep|>", "<|repo_name|>", "a"], eot_token_id=1) == [1, 0, 2]


def test_config_and_names(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf"))
    config = checkpoint.config
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["rms_norm_eps"] == 1e-5 and config["rope_theta"] == 5000.0
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (4, 2, 8)
    assert (config["vocab_size"], config["num_hidden_layers"], config["intermediate_size"]) == (4, 1, 64)
    assert config["tie_word_embeddings"] is True and "rope_scaling" not in config
    assert checkpoint.generation_config == {"eos_token_id": [3, 2]}
    assert checkpoint.config_origin.endswith("m.gguf metadata")
    assert isinstance(checkpoint.metadata["tokenizer.ggml.tokens"], Strings)
    assert set(checkpoint.tensors) == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        *(
            f"model.layers.0.{LAYER_NAMES[n]}.weight"
            for n in LAYER_NAMES
            if n not in ("attn_q_norm", "attn_k_norm")
        ),
    }


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_names_are_llama_cpps(name: str) -> None:
    """Our table against the gguf package's, which maps the other way round."""
    arch = next(a for a, text in gguf.MODEL_ARCH_NAMES.items() if text == name)
    table = gguf.get_tensor_name_map(arch, 3)
    ours = KNOWN[name]
    stored = {gguf.TENSOR_NAMES[t].format(bid=2) for t in gguf.MODEL_TENSORS[arch]}
    known = [n for n in (*(f"blk.2.{n}" for n in ours.layer_names), *ours.global_names) if n in stored]
    assert len(known) >= 9
    for theirs in known:
        assert (
            table.get_name(ours.hf_name(theirs + ".weight"), try_suffixes=(".weight",)) == theirs + ".weight"
        )


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """The order llama.cpp's converter stores query and key rows in."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def test_query_and_key_rows_come_back_in_order(tmp_path: Path) -> None:
    wanted = np.random.default_rng(5).normal(size=(32, 32)).astype(np.float32)
    bias = np.arange(32, dtype=np.float32)
    tensors = llama_tensors()
    tensors["blk.0.attn_q.weight"] = ("F32", (32, 32), permuted(wanted, 4).tobytes())
    tensors["blk.0.attn_q.bias"] = ("F32", (32,), permuted(bias, 4).tobytes())
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors=tensors))
    for kind, right in (("weight", wanted), ("bias", bias)):
        part = Part(f"model.layers.0.self_attn.q_proj.{kind}", right.shape)
        got = pack(Weight("q", right.shape, (part,), "matrix"), checkpoint, DType.F32)
        np.testing.assert_array_equal(got, right)
    assert checkpoint.config["attention_bias"] is True


def test_rope_factors_become_longrope(tmp_path: Path) -> None:
    factors = np.array([1, 1, 4, 8], dtype=np.float32)
    tensors = llama_tensors() | {"rope_freqs.weight": ("F32", (4,), factors.tobytes())}
    scaling = open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors=tensors)).config["rope_scaling"]
    assert scaling["rope_type"] == "longrope" and scaling["attention_factor"] == 1.0
    assert scaling["short_factor"] == scaling["long_factor"] == [1.0, 1.0, 4.0, 8.0]


def test_rope_scaling(tmp_path: Path) -> None:
    more = {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 16,
    }
    config = open_checkpoint(write_gguf(tmp_path / "m.gguf", LLAMA | more)).config
    assert config["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    }


def test_split_files(tmp_path: Path) -> None:
    tensors = llama_tensors()
    names = list(tensors)
    first = {n: tensors[n] for n in names[:5]}
    second = {n: tensors[n] for n in names[5:]}
    path = write_gguf(tmp_path / "m-00001-of-00002.gguf", LLAMA | {"split.count": 2}, first)
    refused(path, r"1 of its 2 parts are missing.*m-00002-of-00002\.gguf")
    write_gguf(tmp_path / "m-00002-of-00002.gguf", {"split.count": 2}, second)
    checkpoint = open_checkpoint(path)
    assert len(checkpoint.tensors) == len(names)
    info = checkpoint.tensors["model.layers.0.mlp.up_proj.weight"]
    assert checkpoint.raw(info).tobytes() == tensors["blk.0.ffn_up.weight"][2]


HEAD = b"GGUF" + struct.pack("<IQQ", 3, 1, 0)


def one_tensor(entry: bytes, data: bytes = bytes(256)) -> bytes:
    head = HEAD + entry
    return head + b"\0" * (-len(head) % 32) + data


def key_value(value: bytes, key: str = "k") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + gguf_string(key) + value + bytes(64)


GOOD = gguf_bytes(LLAMA, llama_tensors())

BROKEN = {
    "empty": (b"", "empty"),
    "magic": (b"GGML" + GOOD[4:], "not a GGUF file"),
    "short": (b"GGUF\3\0", "version"),
    "version 1": (GOOD[:4] + struct.pack("<I", 1) + GOOD[8:], "version 1 is not supported"),
    "big endian": (GOOD[:4] + struct.pack(">I", 3) + GOOD[8:], "big-endian"),
    "tensor count": (GOOD[:8] + struct.pack("<Q", 1 << 60) + GOOD[16:], "tensor count is 11529215046"),
    "metadata count": (GOOD[:16] + struct.pack("<Q", 1 << 60) + GOOD[24:], "metadata count"),
    "truncated data": (GOOD[:-8], "'blk.0.ffn_down.weight' lies at"),
    "truncated header": (GOOD[:700], "truncated"),
    "key twice": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + 2 * (gguf_string("k") + gguf_value(1)) + bytes(32),
        "'k' is given twice",
    ),
    "key not utf-8": (key_value(gguf_value(1), key=b"\xff\xfe"), "metadata key is not UTF-8"),  # type: ignore[arg-type]
    "value type": (key_value(struct.pack("<I", 77)), "'k' has the unknown value type 77"),
    "arrays of arrays of arrays of arrays": (
        key_value(struct.pack("<IIQIQIQ", 9, 9, 1, 9, 1, 9, 1)), "too deeply nested type 9",
    ),
    "array of nothing": (key_value(struct.pack("<IIQ", 9, 66, 1)), "unknown or too deeply nested type 66"),
    "array length": (key_value(struct.pack("<IIQ", 9, 4, 1 << 62)), "length of 'k' is"),
    "strings length": (key_value(struct.pack("<IIQ", 9, 8, 1 << 59)), "length of 'k' is"),
    "string length": (key_value(struct.pack("<IQ", 8, 1 << 63)), "length of 'k' is"),
    "string in array": (key_value(struct.pack("<IIQQ", 9, 8, 2, 1 << 63)), "'k' runs over the end"),
    "alignment": (key_value(gguf_value(12), "general.alignment"), "general.alignment is 12"),
    "alignment type": (key_value(gguf_value("x"), "general.alignment"), "general.alignment is 'x'"),
    "rank": (one_tensor(gguf_entry("t", (1,) * 5, 0, 0)), "'t' has 5 dimensions"),
    "huge dimension": (one_tensor(gguf_entry("t", (1 << 63,), 0, 0)), "'t' has the absurd shape"),
    "huge product": (one_tensor(gguf_entry("t", (1 << 40, 1 << 40), 0, 0)), "'t' has the absurd shape"),
    "beyond the end": (one_tensor(gguf_entry("t", (65,), 0, 0)), "'t' lies at"),
    "offset": (one_tensor(gguf_entry("t", (4,), 0, 1 << 62)), "'t' lies at"),
    "unaligned": (one_tensor(gguf_entry("t", (4,), 0, 4)), "'t' has offset 4"),
    "type": (one_tensor(gguf_entry("t", (4,), 4000, 0)), "'t' has the unknown type 4000"),
    "part of a block": (one_tensor(gguf_entry("t", (48,), 2, 0)), "'t': rows of 48 elements are not whole"),
    "overlap": (
        b"GGUF" + struct.pack("<IQQ", 3, 2, 0) + gguf_entry("a", (16,), 0, 0) + gguf_entry("b", (16,), 0, 32)
        + bytes(512),
        "'a' and 'b' overlap",
    ),
    "tensor twice": (
        b"GGUF" + struct.pack("<IQQ", 3, 2, 0) + 2 * gguf_entry("a", (8,), 0, 0) + bytes(512),
        "'a' is listed twice",
    ),
    "name not utf-8": (one_tensor(gguf_entry(b"\xff", (4,), 0, 0)), "tensor name is not UTF-8"),  # type: ignore[arg-type]
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(BROKEN))
def test_broken_files_are_refused(case: str, tmp_path: Path) -> None:
    data, message = BROKEN[case]
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=re.escape(message)) as caught:
        read_gguf(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def without(key: str) -> dict[str, Any]:
    return {k: v for k, v in LLAMA.items() if k != key}


def renamed(architecture: str, **more: Any) -> dict[str, Any]:
    """LLAMA's metadata under another architecture, with these of its own."""
    own = {k.replace("llama.", f"{architecture}."): v for k, v in LLAMA.items()}
    return {
        **own,
        "general.architecture": architecture,
        **{f"{architecture}.{k}": v for k, v in more.items()},
    }


DEEPSEEK = {
    "attention.kv_lora_rank": 4, "attention.key_length": 8, "attention.value_length": 4,
    "rope.dimension_count": 4,
}  # fmt: skip

WRONG = {
    "no architecture": (without("general.architecture"), "general.architecture is missing"),
    "unknown": (
        LLAMA | {"general.architecture": "foo"},
        "'foo' is not supported; GGUF files of bert, cohere2",
    ),
    "no layers": (without("llama.block_count"), "llama.block_count is missing"),
    "negative": (LLAMA | {"llama.embedding_length": -4}, "llama.embedding_length is -4"),
    "text": (LLAMA | {"llama.context_length": "x"}, "llama.context_length is 'x'"),
    "no number": (LLAMA | {"llama.rope.freq_base": float("nan")}, "llama.rope.freq_base is nan"),
    "per layer": (LLAMA | {"llama.attention.head_count_kv": [1, 2]}, "head_count_kv differs between layers"),
    "rope": (LLAMA | {"llama.rope.scaling.type": "su"}, "llama.rope.scaling.type is 'su'"),
    "experts": (
        LLAMA | {"general.architecture": "gemma", "gemma.expert_count": 8},
        "gemma.expert_count is not 0: gemma with experts cannot be read",
    ),
    "no expert count": (renamed("qwen3moe"), "qwen3moe.expert_count is missing"),
    "no experts used": (renamed("llama", expert_count=4), "llama.expert_used_count is missing"),
    "no latent": (
        renamed("deepseek2", **DEEPSEEK | {"attention.kv_lora_rank": 0}),
        "deepseek2.attention.kv_lora_rank is 0",
    ),
    "all rotated": (
        renamed("deepseek2", **DEEPSEEK | {"rope.dimension_count": 8}),
        "deepseek2.rope.dimension_count is 8 of 8, the whole key",
    ),
    "odd heads": (LLAMA | {"llama.attention.head_count": 5}, "whose rows are not 5 heads"),
    "split": (LLAMA | {"split.count": 3}, "split.count is 3, but the name"),
}


@pytest.mark.parametrize("case", sorted(WRONG))
def test_wrong_metadata_is_refused(case: str, tmp_path: Path) -> None:
    metadata, message = WRONG[case]
    assert "m.gguf" in refused(write_gguf(tmp_path / "m.gguf", metadata), re.escape(message))


@pytest.mark.parametrize(
    ("number", "kind"),
    [(9, "Q8_1"), (15, "Q8_K"), (16, "IQ2_XXS"), (18, "IQ3_XXS")],
)
def test_types_we_do_not_read_are_kept_by_name(number: int, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    data = gguf_bytes(LLAMA, {"token_embd.weight": ("Q4_0", (4, 32), blocks("Q4_0", 4, 32))})
    entry = gguf_entry("token_embd.weight", (4, 32), 2, 0)
    path.write_bytes(data.replace(entry, gguf_entry("token_embd.weight", (4, 32), number, 0)))
    checkpoint = open_checkpoint(path)
    assert checkpoint.unreadable == {"model.embed_tokens.weight": kind}
    needed = Weight("w", (4, 32), (Part("model.embed_tokens.weight", (4, 32)),), "table")
    program = Program("Toy", DType.F32, 4, 8, (), (), (needed,), ())
    with pytest.raises(ModelError, match=f"embed_tokens.weight has type {kind}, not one of F32, .*Q6_K"):
        check_weights(program, checkpoint)


def test_bytes_that_are_no_text_survive_in_a_vocabulary() -> None:
    data = struct.pack("<Q", 2) + b"\xff\xfe"
    assert Strings(data, 1)[0].encode("utf-8", "surrogateescape") == b"\xff\xfe"


def test_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"hello")
    refused(tmp_path / "x.bin", "neither a model directory nor a GGUF file")
    refused(tmp_path / "absent.gguf", "no such file")
    (tmp_path / "pointer.gguf").write_bytes(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    )
    refused(tmp_path / "pointer.gguf", "Git LFS pointer")
    os.mkfifo(tmp_path / "pipe.gguf")
    refused(tmp_path / "pipe.gguf", "neither a directory nor a regular file")
    renamed = tmp_path / "named-otherwise"
    renamed.write_bytes(GOOD)
    assert open_checkpoint(renamed).config["hidden_size"] == 32


@pytest.mark.models
def test_a_large_vocabulary_opens_fast() -> None:
    path = model_path("qwen2.5-coder-0.5b")
    times = []
    for _ in range(3):
        start = time.process_time()  # a busy machine takes longer, but does no more work
        checkpoint = open_checkpoint(path)
        times.append(time.process_time() - start)
    assert min(times) < 0.5
    assert checkpoint.config["vocab_size"] == len(checkpoint.metadata["tokenizer.ggml.tokens"]) == 151936
    kinds = {info.type for info in checkpoint.tensors.values()}
    assert kinds == {TensorType(t) for t in ("F32", "Q5_0", "Q8_0", "Q6_K", "Q4_K")}


def test_arrays_of_arrays_are_read(tmp_path: Path) -> None:
    """Three deep, as the format's specification allows; a fourth is refused, see `BROKEN`."""
    file = tmp_path / "nested.gguf"
    file.write_bytes(key_value(struct.pack("<IIQIQIQii", 9, 9, 1, 9, 1, 5, 2, 7, -8)))
    assert [[list(inner) for inner in outer] for outer in read_gguf(file).metadata["k"]] == [[[7, -8]]]
