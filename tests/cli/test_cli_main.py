"""The command line as a whole: help, defaults, errors in one line, exit codes, start-up time."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rvllm.cli import main as cli
from rvllm.errors import ModelError
from rvllm.offline.progress import loading_bar
from rvllm.version import __version__
from support.models.fetched import model_path


def run(*words: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rvllm", *words],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        **options,
    )  # type: ignore[call-overload,no-any-return]


def one_line(text: str) -> str:
    assert text.count("\n") == 1, text
    return text.strip()


def test_help_lists_the_commands_and_is_quick() -> None:
    """0.08 s of processor time, what other processes take aside; never what the commands themselves need."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    found = run("--help")
    used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    assert found.returncode == 0
    for name in cli.COMMANDS:
        assert f"\n    {name}" in found.stdout
    assert used < 0.5


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        sys.exit(cli.main([command, "--help"]))
    out, err = capsys.readouterr()
    assert (ended.value.code, err) == (0, "")
    assert f"rvllm {command}" in out


def test_help_and_version_load_no_command() -> None:
    script = (
        "import sys; from rvllm.cli.main import main; main(['--help']); main(['--version']);"
        "print([m for m in sys.modules if m.startswith('rvllm.cli.') and m != 'rvllm.cli.main'])"
    )
    found = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert found.stdout.splitlines()[-2:] == [f"rvllm {__version__}", "[]"]


def test_without_words_the_help_is_shown() -> None:
    found = run()
    assert found.returncode == 0
    assert "benchmark" in found.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nonsense"], "unknown command 'nonsense'"),
        (["--port", "x"], "--port: expected a whole number, got 'x'"),
        (["serve", "--prot", "1"], "unknown arguments: --prot; --port? (see rvllm serve --help)"),
        (["serve", "--port", "99999"], "--port: must be at most 65535"),
        (["serve", "--device", "tpu"], "'tpu' is not one of auto, cuda, cpu"),
        (["serve", "--chat-template", "/no/such/file"], "--chat-template: cannot read /no/such/file"),
        (["serve", "--host", "no.such.host.invalid"], "--host: 'no.such.host.invalid'"),
        (["chat", "--url", "ftp://x"], "--url"),
        (["chat", "--temperature", "hot"], "--temperature: expected a number, got 'hot'"),
        (["chat", "--temperature", "-1"], "temperature must be in"),
        (["benchmark", "--n", "1,x"], "--n: expected whole numbers"),
        (["benchmark", "--compare", "/no/such/file"], "--compare: cannot read /no/such/file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_users_mistake_is_one_line_and_2(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert says in one_line(err) and out == ""


def test_a_process_ends_with_its_mistake_in_one_line() -> None:
    found = run("--model", "/no/such/model")
    assert found.returncode == 2, found.stderr
    assert "/no/such/model" in one_line(found.stderr) and found.stdout == ""


def test_errors_carry_their_own_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(words: list[str]) -> int:
        raise {"model": ModelError("x.gguf: no such tensor"), "stop": KeyboardInterrupt()}[words[0]]

    monkeypatch.setattr(cli, "_run", fail)
    assert cli.main(["model"]) == 2
    assert capsys.readouterr().err == "rvllm: x.gguf: no such tensor\n"
    assert cli.main(["stop"]) == 130
    assert capsys.readouterr().err == ""


def test_a_misspelt_variable_is_told_and_leaves_the_output_alone() -> None:
    environ = {k: v for k, v in os.environ.items() if not k.startswith("RVLLM_")}
    found = run("info", "--json", env=environ | {"RVLLM_DEVISE": "cuda"})
    assert found.returncode == 0 and json.loads(found.stdout)
    assert one_line(found.stderr) == "rvllm: no setting reads RVLLM_DEVISE (RVLLM_DEVICE?)"
    assert run("info", "--json", env=environ | {"RVLLM_SEED": "3"}).stderr == ""


@pytest.mark.parametrize("terminal", [True, False])
def test_loading_is_shown_on_a_terminal_alone(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    with loading_bar() as show:
        show(0.5, "loading weights, 3.2 GB/s")
        show(1.0, "loading weights, 3.4 GB/s")
    err = capsys.readouterr().err
    if not terminal:
        assert err == ""
        return
    assert " 50% loading weights, 3.2 GB/s" in err and "━" * 15 + "·" * 15 in err
    assert err.endswith("100% loading weights, 3.4 GB/s\r\x1b[K")  # and nothing of it stays


def test_a_reader_that_stops_reading_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    found = subprocess.run(
        [sys.executable, "-m", "rvllm", "serve", "--help"],
        check=False,
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(write)
    assert found.returncode in (0, 128 + signal.SIGPIPE)
    assert found.stderr == ""


def test_importing_the_package_loads_next_to_nothing() -> None:
    """Under 0.1 s of an idle processor, which is none of what commands need and few modules besides."""
    script = "import sys; before = set(sys.modules); import rvllm; print(*sys.modules.keys() - before)"
    found = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    names = found.stdout.split()
    heavy = {
        "numpy",
        "msgspec",
        "tokenizers",
        "jinja2",
        "starlette",
        "huggingface_hub",
        "asyncio",
        "argparse",
    }
    assert not heavy & set(names) and len(names) < 60, names


def test_ctrl_c_while_loading_ends_quietly(tmp_path: Path) -> None:
    """The engine command is replaced by one that never gets ready."""
    (tmp_path / "config.json").write_text("{}")
    script = tmp_path / "serve.py"
    script.write_text(
        "import sys, rvllm.engine.ipc.client as c\n"
        "import functools\n"
        "start = c.EngineClient.start.__func__\n"
        "c.EngineClient.start = classmethod(functools.partial(start, command=('sleep', '60')))\n"
        "import rvllm.cli.serve as s\n"
        "s.load_tokenizer = lambda *given: print('loading', flush=True)\n"
        "from rvllm.cli.main import main\n"
        f"sys.exit(main(['--port', '0', '--model', {str(tmp_path)!r}]))\n"
    )
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 0)):
        process = subprocess.Popen(
            [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "loading\n"
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
        assert (process.returncode, errors) == (code, "")


@pytest.mark.models
def test_a_broken_chat_template_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{% for m in messages %}")
    model = str(model_path("smollm2-135m"))
    found = run("--model", model, "--port", "0", "--chat-template", str(tmp_path / "t.jinja"))
    assert found.returncode == 2
    assert "--chat-template: chat template: line 1" in one_line(found.stderr)
