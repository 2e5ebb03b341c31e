"""Messages, responses, batches and vectors out of `rvllm serve` with real models, a kill included."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import anthropic
import numpy as np
import openai
import pytest

from support.models.fetched import model_path

pytestmark = [pytest.mark.models, pytest.mark.timeout(300)]


class Served:
    """A server process on a free port."""

    def __init__(self, model: str, log: Path, *flags: str) -> None:
        command = [sys.executable, "-m", "rvllm", "serve", "--model", str(model_path(model)), "--port", "0"]
        command += ["--served-model-name", "real", "--device", "cpu", "--cpu-kernels", "numpy", *flags]
        with log.open("w") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        until, found = time.monotonic() + 120, None
        while found is None:
            assert self.process.poll() is None and time.monotonic() < until, log.read_text()
            found = re.search(r"listening on (http://127\.0\.0\.1:\d+)", log.read_text())
            time.sleep(0.05)
        self.openai = openai.OpenAI(base_url=f"{found[1]}/v1", api_key="none", max_retries=0, timeout=120)
        self.anthropic = anthropic.Anthropic(base_url=found[1], api_key="none", max_retries=0, timeout=120)

    def end(self, number: int = signal.SIGTERM) -> None:
        os.kill(self.process.pid, number)
        self.process.wait(60)


def test_text_and_a_batch_over_a_kill(tmp_path: Path) -> None:
    flags = ["--max-model-len", "512", "--kv-cache-memory-gb", "0.1", "--max-num-seqs", "4"]
    flags += ["--files-dir", str(tmp_path / "files"), "--responses-db", str(tmp_path / "responses.db")]
    served = Served("smollm2-135m", tmp_path / "log", *flags)
    try:
        asked: Any = {"model": "real", "messages": [{"role": "user", "content": "Name a colour."}]}
        chat = served.openai.chat.completions.create(**asked, max_tokens=8, temperature=0)
        words = chat.choices[0].message.content
        message = served.anthropic.messages.create(**asked, max_tokens=8, extra_body={"temperature": 0})
        assert message.content[0].type == "text" and message.content[0].text == words
        first = served.openai.responses.create(
            model="real", input="Name a colour.", max_output_tokens=8, temperature=0
        )
        assert first.output_text == words
        lines = [
            {"custom_id": f"{i}", "method": "POST", "url": "/v1/chat/completions",
             "body": {"messages": [{"role": "user", "content": f"Count from {i}."}], "max_tokens": 8,
                      "temperature": 0}}
            for i in range(12)
        ]  # fmt: skip
        data = "\n".join(json.dumps(line) for line in lines).encode()
        file = served.openai.files.create(file=("in.jsonl", data), purpose="batch")
        batch = served.openai.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        done = 0
        while done < 2:
            counts = served.openai.batches.retrieve(batch.id).request_counts
            done = counts.completed if counts is not None else 0
            time.sleep(0.01)
        assert done < 12
        served.end(signal.SIGKILL)
        served = Served("smollm2-135m", tmp_path / "log2", *flags)
        assert served.openai.responses.retrieve(first.id).output_text == words
        while (found := served.openai.batches.retrieve(batch.id)).status != "completed":
            assert found.status in ("in_progress", "finalizing")
            time.sleep(0.05)
        assert found.output_file_id is not None and found.error_file_id is None
        results = [
            json.loads(line) for line in served.openai.files.content(found.output_file_id).text.splitlines()
        ]
        assert [entry["custom_id"] for entry in results] == [f"{i}" for i in range(12)]
        # Whatever else was running, each line has the answer that it has alone.
        for entry in results[:2]:
            body = lines[int(entry["custom_id"])]["body"]
            alone = served.openai.chat.completions.create(model="real", **body)  # type: ignore[call-overload]
            said = entry["response"]["body"]["choices"][0]["message"]["content"]
            assert said == alone.choices[0].message.content
    finally:
        served.end()


def test_vectors(tmp_path: Path) -> None:
    served = Served("minilm-l6-v2", tmp_path / "log")
    try:
        texts = ["A cat sits on the mat.", "A kitten is on the rug.", "Interest rates rose again."]
        answer = served.openai.embeddings.create(model="real", input=texts)
        cat, kitten, rates = (np.array(entry.embedding) for entry in answer.data)
        assert len(cat) == 384 and np.linalg.norm(cat) == pytest.approx(1, abs=1e-5)
        assert cat @ kitten > 0.5 > 0.2 > cat @ rates
        with pytest.raises(openai.BadRequestError, match=r"takes \d+ tokens"):
            served.openai.embeddings.create(model="real", input="word " * 2000)
        with pytest.raises(openai.BadRequestError, match="generates no text"):
            served.openai.completions.create(model="real", prompt="hello")
    finally:
        served.end()
