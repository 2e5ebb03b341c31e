"""`rvllm race` with servers of known speed: what is measured, who is said to lose, and the gate."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import pytest

from rvllm.bench.gate import Limits, judge_all
from rvllm.bench.load import Sent
from rvllm.bench.race.engines import engines_of, weighed
from rvllm.bench.race.goodput import best, bounds_of, search
from rvllm.bench.race.measure import Entry
from rvllm.bench.race.plot import bars, lines
from rvllm.bench.race.report import figures, losses
from rvllm.bench.race.server import first_model
from rvllm.bench.race.workload import Workload
from rvllm.bench.serving import good
from rvllm.cli.main import main
from rvllm.errors import RvllmError, UsageError

PEER = str(Path(__file__).with_name("openai_peer.py"))
WORK = ["--n", "1,2", "--input-len", "5", "--output-len", "3"]


@pytest.fixture(scope="module")
def urls() -> Iterator[dict[str, str]]:
    """Servers that run: 4 and 60 ms a token, and one whose answers are too short."""
    found, processes = {}, []
    try:
        for name, *words in (("fast", "4"), ("slow", "60"), ("short", "4", "1")):
            port = 20000 + random.SystemRandom().randrange(10000)
            processes.append(subprocess.Popen([sys.executable, PEER, str(port), *words]))
            found[name] = f"http://127.0.0.1:{port}"
        for url in found.values():
            for _ in range(200):
                try:
                    first_model(url)
                    break
                except RvllmError:
                    subprocess.run(["sleep", "0.05"], check=True)
        yield found
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_a_slow_server_is_told_and_stopped(
    urls: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    race = ["race", "--subject", f"new={urls['slow']}", "--against", f"old={urls['fast']}", "--ways", "http"]
    code = main([*race, *WORK, "--gate", "--out", str(tmp_path / "r")])
    assert code in (3, 4)  # a busy machine may be too noisy to tell, but never lets it pass
    assert {3: "roll back", 4: "unclear"}[code] in capsys.readouterr().out
    found = json.loads((tmp_path / "r" / "report.json").read_text())
    new, old = found["engines"]
    assert (new["name"], old["name"], found["turns"]) == ("new", "old", 3)
    assert min(old["http"]["1"]["ttft_ms"]) >= 4 and min(new["http"]["1"]["ttft_ms"]) >= 60
    assert len(new["http"]["2"]["tokens_per_s"]) == 3 and new["failed"] == new["wrong_length"] == 0
    text = (tmp_path / "r" / "report.md").read_text()
    behind = text.split("## Where new is behind")[1]
    assert "Output tokens a second, over HTTP, N=2" in behind and "of old" in behind
    for name in re.findall(r"\]\((\S+\.svg)\)", text):
        assert ET.parse(tmp_path / "r" / name).getroot().tag.endswith("svg")
    assert "http-tokens_per_s.svg" in text


@pytest.mark.parametrize(("load", "told"), [(900.0, True), (0.0, False)])
def test_a_report_tells_of_other_work(
    load: float, told: bool, urls: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load))
    race = ["race", "--subject", f"new={urls['fast']}", "--against", f"old={urls['fast']}", "--ways", "http"]
    main([*race, *WORK, "--turns", "1", "--out", str(tmp_path / "r")])
    assert ("other work had the cores" in (tmp_path / "r" / "report.md").read_text()) is told


def test_short_answers_and_failures_are_no_victory(
    urls: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    race = ["race", "--subject", f"new={urls['short']}", "--against", f"old={urls['slow']}", "--ways", "http"]
    assert main([*race, *WORK, "--gate", "--gate-noise", "9"]) == 3
    assert "new: 9 answers had another length than asked" in capsys.readouterr().out
    race = ["race", "--subject", f"new={urls['fast']}", "--against", "gone=http://127.0.0.1:9"]
    assert main([*race, *WORK, "--turns", "1"]) == 1
    assert "not measured: http://127.0.0.1:9 lists no model" in capsys.readouterr().out


@pytest.mark.parametrize(("slower", "failed", "code"), [(1.0, 0, 0), (1.3, 0, 3), (1.0, 1, 3), (0.7, 0, 0)])
def test_the_gate_compares_with_each_other_engine(slower: float, failed: int, code: int) -> None:
    def entry(name: str, scale: float, failures: int = 0) -> Entry:
        times = [scale * value for value in (10.0, 10.2, 9.9)]
        samples = {"tokens_per_s": [1 / t for t in times], "ttft_ms": times, "tpot_ms": times}
        return Entry(name, http={4: samples}, failed=failures)

    entries = [entry("new", slower, failed), entry("old", 1.0), entry("other", 1.0)]
    found = [figure for other in entries[1:] for figure in figures(entries, other)]
    assert len(found) == 8 and judge_all(found, Limits())[1] == code
    entries[0].absent["http"] = "new did not start"
    with pytest.raises(UsageError, match="did not start"):
        figures(entries, entries[1])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gate", "--ways", "direct"], "--ways must have http"),
        (["--gate", "--turns", "2"], "--gate needs 3 measurements"),
        (["--out", "/dev/null/report"], "--out: cannot make /dev/null/report"),
        (["--stall-timeout", "0"], "--stall-timeout must be above 0"),
        (["--subject", "127.0.0.1:8000"], "--subject: expected NAME=URL"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_measured(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    race = ["race", "--subject", "new=http://127.0.0.1:9", "--against", "old=http://127.0.0.1:9"]
    assert main([*race, *words]) == 2 and time.monotonic() - began < 10
    found = capsys.readouterr()
    assert said in found.err and "turn 1" not in found.err


@pytest.mark.parametrize(
    "url", ["http://", "http://127.0.0.1:99999", "http://[::1", "https://127.0.0.1:9/v1"]
)
def test_a_wrong_url_is_a_line_and_not_a_victory(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    race = ["race", "--subject", f"new={url}", "--against", "old=http://127.0.0.1:9", "--ways", "http"]
    assert main([*race, *WORK]) == 1
    assert "lists no model" in capsys.readouterr().err
    assert main([*race, *WORK, "--gate"]) == 2
    assert "the gate has no figures" in capsys.readouterr().err


def test_a_race_that_is_cut_short_leaves_its_whole_turns(
    urls: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def say(text: str) -> None:
        if text.startswith("turn 2"):
            raise KeyboardInterrupt

    monkeypatch.setattr("rvllm.cli.race._say", say)
    race = ["race", "--subject", f"new={urls['fast']}", "--ways", "http", "--out", str(tmp_path / "r")]
    assert main([*race, *WORK]) == 130
    found = json.loads((tmp_path / "r" / "report.json").read_text())
    assert found["turns"] == 1 and len(found["engines"][0]["http"]["2"]["tokens_per_s"]) == 1
    assert "Engines in turns (1)" in (tmp_path / "r" / "report.md").read_text()


def test_a_server_that_hangs_fails_its_requests(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"

        def models() -> None:
            """Lists one to whoever asks, and answers nothing else."""
            held = []
            while True:
                try:
                    link, _ = listener.accept()
                except OSError:
                    return
                held.append(link)
                if link.recv(65536).startswith(b"GET"):
                    link.sendall(b'HTTP/1.0 200 OK\r\n\r\n{"data": [{"id": "m"}], "version": "1"}')
                    link.close()

        threading.Thread(target=models, daemon=True).start()
        race = ["race", "--subject", f"new={url}", "--ways", "http", "--stall-timeout", "0.2", "--turns", "1"]
        assert main([*race, *WORK]) == 1
        listener.shutdown(socket.SHUT_RDWR)
    assert "refuses the warm-up" in (said := capsys.readouterr().err) and "nothing came for 0.2 s" in said


FAKE = """
class SamplingParams:
    def __init__(self, **words): self.length = words["max_tokens"]
class Out:
    def __init__(self, n): self.outputs = [self]; self.token_ids = [0] * n
class LLM:
    def __init__(self, model, wait): pass
    def generate(self, prompts, params, use_tqdm):
        import time; time.sleep(0.001 * max(p.length for p in params))
        return [Out(p.length) for p in params]
"""


def test_engines_are_started_measured_both_ways_and_ended(
    urls: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "fake.py").write_text(FAKE)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "e.toml").write_text(
        f"""[engines.fake]
serve = ["{sys.executable}", "{PEER}", "{{port}}", "5"]
direct = ["{sys.executable}", "python"]
version = ["{sys.executable}", "-c", "print('fake version 7')"]
env = {{PYTHONPATH = "{tmp_path}"}}
settings = {{wait = 1}}
size = ["{tmp_path / "fake.py"}"]
[engines.broken]
serve = ["{sys.executable}", "-c", "import sys; sys.exit('no such flag')"]
"""
    )
    race = ["race", "--subject", f"url={urls['slow']}", "--against", "fake,broken", "--engines",
            str(tmp_path / "e.toml"), "--model", str(tmp_path / "model"), "--turns", "2",
            "--out", str(tmp_path / "r"), "--goodput", "ttft:200", "--goodput-requests", "3",
            "--goodput-rate", "2000"]  # fmt: skip
    assert main([*race, *WORK]) == 1  # one could not be measured
    found = {e["name"]: e for e in json.loads((tmp_path / "r" / "report.json").read_text())["engines"]}
    fake = found["fake"]
    assert fake["version"] == "fake version 7" and fake["size_bytes"] == len(FAKE)
    assert len(fake["started"]) == len(fake["first_token"]) == len(fake["memory"]) == 2
    assert all(a < b for a, b in zip(fake["started"], fake["first_token"], strict=True))
    assert min(fake["memory"]) > 1e6
    assert len(fake["direct"]["2"]["tokens_per_s"]) == 2 and fake["direct"]["2"]["tokens_per_s"][0] < 2000
    assert fake["goodput"] and fake["goodput"][0]["rate"] == 2000
    assert "no such flag" in found["broken"]["absent"]["http"]
    text = capsys.readouterr().out
    assert "broken ended with 1" in text and "## Goodput" in text and "| fake | fake version 7 |" in text


def test_a_race_that_is_ended_ends_its_server(tmp_path: Path) -> None:
    told = tmp_path / "pid"
    never = (
        f"import os, pathlib, time; pathlib.Path({str(told)!r}).write_text(str(os.getpid())); time.sleep(600)"
    )
    (tmp_path / "e.toml").write_text(
        f"[engines.never]\nserve = {json.dumps([sys.executable, '-c', never])}\n"
    )
    (tmp_path / "config.json").write_text("{}")
    race = subprocess.Popen(
        [sys.executable, "-m", "rvllm", "race", "--subject", "a=http://127.0.0.1:9", "--against", "never",
         "--engines", str(tmp_path / "e.toml"), "--model", str(tmp_path), "--ways", "http", *WORK],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not (told.exists() and told.read_text()):
        assert race.poll() is None
        time.sleep(0.05)
    race.terminate()
    assert race.wait(60) == 128 + signal.SIGTERM
    assert not Path("/proc", told.read_text()).exists()


def test_rates_are_searched_up_to_the_bound() -> None:
    tried: list[float] = []

    def measure(rate: float) -> list[Sent]:
        tried.append(rate)
        late = 1.0 if rate > 11 else 0.1
        return [Sent(1, 5, 0.0, late, late + 0.4)] * 20

    rows: list[dict[str, object]] = []
    search(measure, bounds_of(["ttft:500", "tpot:100"], 0.95), 1.0, rows)
    assert tried == [1, 2, 4, 8, 16, 12, 10, 11] and best(rows) == 11
    goals = bounds_of(["tpot:99"], 1.0).goals
    assert not good(Sent(1, 5, 0.0, 0.1, 0.5), goals) and good(Sent(1, 6, 0.0, 0.1, 0.5), goals)
    assert not good(Sent(1, error="gone"), goals) and good(Sent(1, 1, 0.0, 0.1, 0.1), goals)
    for words in (["ttft"], ["x:1"], ["ttft:-1"], ["ttft:nan"]):
        with pytest.raises(UsageError, match="--goodput"):
            bounds_of(words, 0.9)


def test_prompts_are_the_same_for_all_and_new_in_each_turn() -> None:
    for kind in ("random", "fixed", "sharegpt", "long"):
        work = Workload(kind, 40, 6, 300)
        first = work.requests(30, 0)
        assert first == work.requests(30, 0)
        assert all(a != b for a, b in zip(first, work.requests(30, 1), strict=True))
        assert all((r.ids or r.text) and len(r.ids) + r.output_len <= work.longest for r in first)
        assert all(150 <= token < 300 for r in first for token in r.ids)
    lengths = [len(r.ids) for r in Workload("sharegpt", 1, 2, 300).requests(3000, 0)]
    assert (
        80 < sorted(lengths)[1500] < 150 and 150 < sum(lengths) / 3000 < 250
    )  # vLLM's sample: 215 on average
    assert [len(r.ids) for r in Workload("long", 40, 2, 300).requests(4, 0)] == [40, 20, 10, 40]


def test_every_loss_is_listed_however_small() -> None:
    ours = Entry("ours", started=[2.0, 2.2, 2.1], http={4: {"tokens_per_s": [100, 99, 98], "ttft_ms": [5.0]}})
    other = Entry(
        "other", started=[1.0, 1.1, 1.2], http={4: {"tokens_per_s": [97, 99.5, 120], "ttft_ms": [6.0]}}
    )
    found = losses([ours, other])
    assert [(loss.cell, loss.clear) for loss in found] == [
        ("Start to ready, s", True),
        ("Output tokens a second, over HTTP, N=4", False),
    ]


def test_plots_are_svg_of_what_was_measured() -> None:
    drawn = ET.fromstring(
        lines("t <&>", "N", "y", {"a": [(1, 10, 8, 12), (16, 40, 30, 41)], "b": [(1, 5, 5, 5)]})
    )
    marks = [e for e in drawn.iter() if e.tag.endswith("circle")]
    assert len(marks) == 3 and float(marks[1].attrib["cy"]) < float(marks[0].attrib["cy"])
    rects = [e for e in ET.fromstring(bars("s", "MB", {"a": (2, 2, 2), "b": (4, 4, 4)})).iter()
             if e.tag.endswith("rect") and "fill" in e.attrib][1:]  # fmt: skip
    assert float(rects[1].attrib["height"]) == pytest.approx(2 * float(rects[0].attrib["height"]))
    assert lines("", "", "", {}) == bars("", "", {}) == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--against", "gpt"], "neither a URL nor one of llama.cpp, sglang, vllm"),
        (["--against", "vllm"], "--at vllm=/path/to/its/bin/python"),
        (["--against", "http://x,http://x"], "each engine runs once"),
        (["--at", "vllm=/x"], "vllm does not take part"),
        (["--at", "vllm"], "expected NAME=VALUE"),
        (
            ["--against", "vllm", "--at", "vllm=/no/such"],
            "--at vllm=/no/such: there is no such file or folder",
        ),
        (["--subject", "rvllm"], "--subject: expected NAME=URL"),
        (["--subject", "a=http://x", "--n", "0"], "--n"),
        (["--subject", "a=http://x", "--ways", "grpc"], "--ways"),
        (["--subject", "a=http://x", "--prompts", "poems"], "poems"),
        (["--subject", "a=http://x", "--turns", "0"], "--turns must be above 0"),
        (["--subject", "a=http://x", "--output-len", "1"], "--output-len must be at least 2"),
        (["--subject", "a=http://x", "--gate"], "--against"),
        (["--subject", "a=http://x", "--against", "b=http://y", "--gate", "--turns", "2"], "raise --turns"),
        (["--subject", "a=http://x", "--engines", "/no/such.toml"], "cannot read /no/such.toml"),
    ],
)
def test_mistakes_are_told(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["race", *words]) == 2
    assert said in capsys.readouterr().err


def test_tables_of_engines_are_checked(tmp_path: Path) -> None:
    file = tmp_path / "e.toml"
    for text, said in (
        ("x = 1", "no TOML file with"),
        ("[engines.a]\nserv = []", "'serv'"),
        ("[engines.a]\nserve = 3", "a: Expected `array`"),
    ):
        file.write_text(text)
        with pytest.raises(UsageError, match=said):
            engines_of(["a"], {}, {}, file)
    file.write_text('[engines."llama.cpp"]\nenv = {A = "1"}')
    (engine,) = engines_of(["llama.cpp"], {"llama.cpp": str(tmp_path)}, {"llama.cpp": "-t 2"}, file)
    assert engine.env == {"A": "1"} and engine.serve[-2:] == ["-t", "2"] and engine.direct
    assert weighed(engine) == ([str(tmp_path)], file.stat().st_size)
