"""Messages, responses, batches and vectors out of `rvllm serve` with real models, a kill included."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import anthropic
import numpy as np
import openai
import pytest

from support.clients.batches import chat_line, completed, ended, results, start
from support.clients.served import Served
from support.models.fetched import model_path
from support.waiting import until

pytestmark = [pytest.mark.models, pytest.mark.timeout(300)]


def serve(model: str, *flags: str) -> Served:
    own = ("--model", str(model_path(model)), "--served-model-name", "real")
    return Served(*own, "--device", "cpu", "--cpu-kernels", "numpy", *flags)


def test_text_and_a_batch_over_a_kill(tmp_path: Path) -> None:
    flags = ["--max-model-len", "512", "--kv-cache-memory-gb", "0.1", "--max-num-seqs", "4"]
    flags += ["--files-dir", str(tmp_path / "files"), "--responses-db", str(tmp_path / "responses.db")]
    with serve("smollm2-135m", *flags) as served, served.openai() as client:
        asked: Any = {"model": "real", "messages": [{"role": "user", "content": "Name a colour."}]}
        chat = client.chat.completions.create(**asked, max_tokens=8, temperature=0)
        words = chat.choices[0].message.content
        with anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0) as claude:
            message = claude.messages.create(**asked, max_tokens=8, extra_body={"temperature": 0})
        assert message.content[0].type == "text" and message.content[0].text == words
        first = client.responses.create(
            model="real", input="Name a colour.", max_output_tokens=8, temperature=0
        )
        assert first.output_text == words
        lines = [chat_line(f"Count from {i}.", model="real", max_tokens=8, temperature=0) for i in range(12)]
        batch = start(client, *lines)
        until(lambda: completed(client, batch) >= 2)
        assert completed(client, batch) < 12
        served.end(signal.SIGKILL)
    with serve("smollm2-135m", *flags) as served, served.openai() as client:
        assert client.responses.retrieve(first.id).output_text == words
        found = ended(client, batch)
        assert found.status == "completed" and found.error_file_id is None
        answers = results(client, found.output_file_id)
        assert [entry["custom_id"] for entry in answers] == [line["custom_id"] for line in lines]
        # Whatever else was running, each line has the answer that it has alone.
        for line, entry in zip(lines[:2], answers, strict=False):
            alone = client.chat.completions.create(**line["body"])
            said = entry["response"]["body"]["choices"][0]["message"]["content"]
            assert said == alone.choices[0].message.content


def test_vectors() -> None:
    with serve("minilm-l6-v2") as served, served.openai() as client:
        texts = ["A cat sits on the mat.", "A kitten is on the rug.", "Interest rates rose again."]
        answer = client.embeddings.create(model="real", input=texts)
        cat, kitten, rates = (np.array(entry.embedding) for entry in answer.data)
        assert len(cat) == 384 and np.linalg.norm(cat) == pytest.approx(1, abs=1e-5)
        assert cat @ kitten > 0.5 > 0.2 > cat @ rates
        with pytest.raises(openai.BadRequestError, match=r"takes \d+ tokens"):
            client.embeddings.create(model="real", input="word " * 2000)
        with pytest.raises(openai.BadRequestError, match="generates no text"):
            client.completions.create(model="real", prompt="hello")
