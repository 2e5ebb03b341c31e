"""The process that workers are forked from: `python -m rvllm.text.worker.process`, started by `WorkerPool`.

It loads the tokenizer once and touches nothing that a client sent. Each worker is a fork of it, ready in a
few milliseconds, so that killing one costs little. Orders come over a socket at its standard input: fork a
worker that answers on the descriptor sent along, or kill one. The end of that socket is the end of all.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import pickle
import resource
import select
import signal
import socket
import struct
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from rvllm.errors import RvllmError

FORK, KILL = b"F", b"K"
ORDER = struct.Struct("<cI")  # what to do, the worker's number
REPORT = struct.Struct("<Ii")  # the worker's number, how it ended: an exit code, or minus a signal
READY = 0xFFFFFFFF  # the number in the first report
HEAD = struct.Struct("<I")  # bytes of the task or answer that follows
IDLE_SECONDS = 0.5
DONE, REFUSED, EXCEEDED, BROKEN = range(4)  # kinds of answers

_PR_SET_PDEATHSIG = 1


class Launch(msgspec.Struct):
    """What to load, and what one worker may take.

    memory, stack: bytes, beyond what it starts with. seconds: of a processor's time, for one task.
    """

    model: str
    memory: int
    stack: int
    seconds: float


def main() -> int:
    """Forks and kills workers as told, until the other side is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent's end is the end
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads do not survive a fork
    control = socket.socket(fileno=os.dup(0))
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    launch = msgspec.msgpack.decode(control.recv(1 << 16), type=Launch)
    _die_with_parent()
    from rvllm.text.tokenizers.tokenizer import Tokenizer

    try:
        tokenizer = Tokenizer.load(Path(launch.model))
    except RvllmError as error:
        print(f"text workers: {error}", file=sys.stderr)
        return error.exit_code
    _import_all()
    gc.collect()
    gc.freeze()  # what is loaded stays shared with the forks
    control.send(REPORT.pack(READY, 0))
    return _follow(control, launch, tokenizer)


def _import_all() -> None:
    import jinja2.sandbox  # noqa: F401
    import llguidance
    import llguidance.gbnf_to_lark  # noqa: F401

    import rvllm.text.chat.jinja
    import rvllm.text.worker.tasks  # noqa: F401


def _follow(control: socket.socket, launch: Launch, tokenizer: Any) -> int:
    workers: dict[int, int] = {}
    if not select.select([control], [], [], IDLE_SECONDS)[0] and tokenizer.spelling.kind != "other":
        from rvllm.text.grammar.grammar import native_vocabulary

        native_vocabulary(tokenizer)  # takes a while; workers forked before make their own
        gc.freeze()
    while True:
        try:
            data, ancillary, _, _ = control.recvmsg(ORDER.size, socket.CMSG_SPACE(4))
        except ConnectionResetError:
            return 0
        if not data:
            return 0
        order, number = ORDER.unpack(data)
        if order == FORK:
            (theirs,) = struct.unpack_from("i", ancillary[0][2])
            workers[number] = os.fork() or _worker(control, theirs, launch, tokenizer)
            os.close(theirs)
        else:
            pid = workers.pop(number)
            os.kill(pid, signal.SIGKILL)
            control.send(REPORT.pack(number, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))


def _worker(control: socket.socket, descriptor: int, launch: Launch, tokenizer: Any) -> NoReturn:
    """The life of a forked worker; it never returns into the code of the process that it came from."""
    code = 1
    try:
        control.close()
        _die_with_parent()
        _limit(launch)
        code = _answer(socket.socket(fileno=descriptor), tokenizer, launch)
    finally:
        os._exit(code)


def _answer(sock: socket.socket, tokenizer: Any, launch: Launch) -> int:
    encode = msgspec.msgpack.Encoder().encode
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    stream = sock.makefile("rb")
    while head := stream.read(HEAD.size):
        task = stream.read(HEAD.unpack(head)[0])
        signal.setitimer(signal.ITIMER_PROF, launch.seconds)  # SIGPROF ends the process
        kind, value = _done(task, tokenizer)
        signal.setitimer(signal.ITIMER_PROF, 0)
        del task
        # What a heap has taken it seldom gives back; a fresh worker is cheap.
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
        leaves = kind == EXCEEDED or grown > launch.memory // 4
        answer = encode((kind, value, leaves))
        sock.sendall(HEAD.pack(len(answer)) + answer)
        if leaves:
            return 0
    return 0


def _done(data: bytes, tokenizer: Any) -> tuple[int, Any]:
    """(kind, result or what is wrong)."""
    try:
        task, args, options = pickle.loads(data)  # from the parent, which pickled it itself
        return DONE, task(tokenizer, *args, **options)
    except RvllmError as error:
        return REFUSED, str(error)
    except MemoryError:
        return EXCEEDED, "memory"
    except RecursionError:
        return EXCEEDED, "stack"
    except BaseException as error:
        if type(error).__name__ == "PanicException":  # native code gave up
            return EXCEEDED, "care"
        traceback.print_exc()
        return BROKEN, f"{type(error).__name__}: {error}"[:500]


def _limit(launch: Launch) -> None:
    """Bounds this process's memory and stack, and makes it the first that a full machine kills."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + launch.memory
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_STACK, (launch.stack, launch.stack))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):  # some sandboxes do not let it be set
        Path("/proc/self/oom_score_adj").write_text("1000")


def _die_with_parent() -> None:
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before
        os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
