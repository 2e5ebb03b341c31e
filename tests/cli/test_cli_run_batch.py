"""`rvllm run-batch` on a small random model: answers in order, over interruptions, one line for mistakes."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from rvllm.cli.main import main
from rvllm.cli.run_batch import Journal
from support.models.tiny_llm import CONFIG


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    return ["run-batch", "-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"),
            "--model", str(tmp_path / "model"), "--served-model-name", "tiny", "--load-format", "dummy",
            "--device", "cpu", "--kv-cache-memory-gb", "0.01", "--skip-tokenizer-init",
            "--threads", "1"]  # fmt: skip


def line(i: int, **body: Any) -> str:
    full = {"model": "tiny", "prompt": [i % 120 + 1, 5, 9], "max_tokens": 4, "temperature": 0,
            **body}  # fmt: skip
    return json.dumps({"custom_id": f"{i}", "method": "POST", "url": "/v1/completions", "body": full})


def read(file: Path) -> list[Any]:
    return [json.loads(text) for text in file.read_text().splitlines()]


def test_all_lines_are_answered_in_order_and_not_twice(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [line(i) for i in range(40)] + [line(40, temperature=-1), line(41, model="other")]
    source.write_text("\n".join(lines) + "\n", encoding="utf-8-sig")  # with the mark that editors put there
    assert main(flags) == 0
    assert "42 requests" in capsys.readouterr().err
    first = read(target)
    assert [entry["custom_id"] for entry in first] == [f"{i}" for i in range(42)]
    assert [entry["response"]["status_code"] for entry in first] == [200] * 40 + [400, 404]
    assert all(len(entry["response"]["body"]["choices"][0]["token_ids"]) == 4 for entry in first[:40])
    assert list(tmp_path.glob("out.jsonl.*")) == []

    # What a killed run leaves: some answers, the last one cut off.
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    kept = b'3 0 {"custom_id":"3","kept":true}\n11 1 {"custom_id":"11","kept":true}\n7 0 {"custom'
    (tmp_path / "out.jsonl.part").write_bytes(f"rvllm run-batch {digest}\n".encode() + kept)
    assert main(flags) == 0
    assert "3 of them failed" in capsys.readouterr().err
    second = read(target)
    assert [entry["custom_id"] for entry in second] == [
        "3" if i == 2 else "11" if i == 10 else f"{i}" for i in range(42)
    ]
    assert [i for i, entry in enumerate(second) if entry.get("kept")] == [2, 10]

    (tmp_path / "out.jsonl.part").write_bytes(b"rvllm run-batch of another input\n1 0 {}\n")
    source.write_text(line(0) + "\n")
    assert main(flags) == 0
    [only] = read(target)
    assert only["custom_id"] == "0" and only["response"]["status_code"] == 200


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (line(1) + "\n{", "line 2: the line is no request"),
        (line(1) + "\n" + line(1), "line 2: custom_id '1' is not the first"),
        (line(1, stream=True), "line 1: a batch takes neither stream"),
        (line(1).replace("/v1/completions", "/v1/files"), "line 1: url must be"),
        ("\n", "holds no requests"),
        (None, "cannot use"),
    ],
)
def test_mistakes_are_one_line(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, says: str
) -> None:
    if text is not None:
        (tmp_path / "in.jsonl").write_text(text)
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_a_journal_outlives_two_kills(tmp_path: Path) -> None:
    """The line that the first kill cut off does not run into the first line after it."""
    target = tmp_path / "out.jsonl"
    (tmp_path / "out.jsonl.part").write_bytes(b'rvllm run-batch d\n3 0 {"a":1}\n7 0 {"cus')
    journal = Journal(target, "d")
    journal.add(9, True, b"{}")
    journal.close()
    again = Journal(target, "d")
    assert dict(again.done) == {3: (False, b'{"a":1}'), 9: (True, b"{}")}
    again.close()
