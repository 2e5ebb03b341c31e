"""The official `openai` npm client against real models: `openai_client.mjs`, where there is node."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.models.fetched import model_path

pytestmark = [pytest.mark.models, pytest.mark.timeout(600)]

RUN = Path(__file__).parent.parent.parent / "scripts" / "clients" / "run.py"
SURFACES = {
    "models",
    "chat",
    "tool loop",
    "structured output",
    "completions",
    "responses",
    "files and batches",
}


def test_every_surface(tmp_path: Path) -> None:
    for name in ("qwen2.5-coder-0.5b", "minilm-l6-v2"):
        model_path(name)  # skips where they are not to be had
    command = [sys.executable, str(RUN), "npm", "--work", str(tmp_path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=580)
    if done.returncode == 69:
        pytest.skip(done.stdout.strip().splitlines()[0])
    checks = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [check for check in checks if not check["ok"]] == [] and done.returncode == 0, (
        done.stdout + done.stderr
    )
    assert {check["name"] for check in checks} > SURFACES
