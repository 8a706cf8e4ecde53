"""Starts Python processes that have PyTorch, PEFT and Flower imported already.

Importing them takes ten seconds of a core, and the tests start some two hundred processes. Here one
process imports them once and forks whenever a test asks for a process. A forked process is one of
its own, with its own folder, environment, files and process id: it can be signalled and killed.
Everything of Umbel it imports itself, in the order that the program has.

What only a new interpreter shows is tested with `subprocess`: which modules a program imports
(`client/relay/test_relay_imports.py`, `server/test_imports.py`), that a trainer has given its
network away before anything could start a thread (`client/trainer/test_isolation.py`), and that
every documented `python -m` starts (`e2e/test_doors.py`).
"""

import atexit
import contextlib
import functools
import gc
import importlib
import io
import json
import logging
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from support.waiting import HANGING

LIBRARIES = (
    "numpy",
    "torch",
    "torch._inductor.compile_fx",
    "bitsandbytes",
    "transformers",
    "peft",
    "opacus",
    "opacus.accountants",
    "scipy.stats",
    "flwr.common",
    "grpc",
    "pydantic.networks",
    "sqlalchemy.orm",
    "sqlalchemy.dialects.sqlite",
    "alembic.command",
    "fastapi",
    "uvicorn.protocols.http.h11_impl",
    "requests",
    "httpx",
    "cryptography.x509",
    "msgspec",
    "safetensors.numpy",
    "typer",
    "rich.console",
)
"""What is imported in advance: nothing of Umbel, nor what starts a thread, as pyarrow does."""

TESTS = Path(__file__).parents[1]

_MOST = 1 << 17
"""Bytes of a request, at most: the length of an environment."""


class Process:
    """One process, with the part of `subprocess.Popen` that the tests need."""

    def __init__(self, arguments: Sequence[str], pid: int, ended: socket.socket) -> None:
        """Args:
        ended: receives the status of the process when it has ended.
        """
        self.args = list(arguments)
        self.pid = pid
        self.returncode: int | None = None
        self._ended = ended

    def poll(self) -> int | None:
        """Returns the exit code, negative after a signal; None while the process runs."""
        return self._look(0)

    def wait(self, timeout: float = HANGING) -> int:
        """Returns the exit code once the process has ended.

        Raises:
            subprocess.TimeoutExpired: the process still runs after `timeout` seconds.
        """
        code = self._look(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return code

    def send_signal(self, number: int) -> None:
        """Sends a signal to the process unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kills the process unless it has ended."""
        self.send_signal(signal.SIGKILL)

    def _look(self, seconds: float) -> int | None:
        if self.returncode is None and select.select([self._ended], [], [], seconds)[0]:
            self.returncode = int(self._ended.recv(16))
            self._ended.close()
        return self.returncode


def start(
    *arguments: object,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: int | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
) -> Process:
    """Starts what `python ARGUMENTS` would start.

    Args:
        arguments: `-m MODULE`, `-P -m MODULE`, or a script, and then its own arguments.
        env: the whole environment; None: that of this process.
        stdin: a descriptor, as `stdout` and `stderr`; None: nothing to read.
        stdout: None: this process's own, as for `stderr`.
    """
    words = list(map(str, arguments))
    request = {
        "arguments": words,
        "folder": str(cwd or Path.cwd()),
        "environment": dict(os.environ if env is None else env),
    }
    ours, theirs = socket.socketpair()
    with contextlib.ExitStack() as stack:
        stack.callback(theirs.close)
        if stdin is None:
            stdin = stack.enter_context(Path(os.devnull).open()).fileno()
        descriptors = [
            theirs.fileno(),
            stdin,
            1 if stdout is None else stdout,
            2 if stderr is None else stderr,
        ]
        pid = _client().ask(json.dumps(request).encode(), descriptors)
    return Process(words, pid, ours)


def run(
    *arguments: object,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    input: str = "",
    timeout: float = HANGING,
) -> "subprocess.CompletedProcess[str]":
    """Runs what `python ARGUMENTS` would run, and returns its exit code and all that it printed.

    Raises:
        subprocess.TimeoutExpired: it took longer than `timeout` seconds, and was killed.
    """
    with contextlib.ExitStack() as stack:
        given, out, err = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(3))
        given.write(input.encode())
        given.seek(0)
        process = start(
            *arguments,
            cwd=cwd,
            env=env,
            stdin=given.fileno(),
            stdout=out.fileno(),
            stderr=err.fileno(),
        )
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        printed = []
        for file in (out, err):
            file.seek(0)
            printed.append(file.read().decode())
    return subprocess.CompletedProcess(process.args, code, *printed)


class _Client:
    """This process's end of its server, which it starts."""

    def __init__(self) -> None:
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "support.warm_python", str(theirs.fileno())],
                cwd=TESTS,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def ask(self, request: bytes, descriptors: list[int]) -> int:
        """Has a process started; returns its id."""
        assert len(request) <= _MOST
        socket.send_fds(self._requests, [request], descriptors)
        answer = self._requests.recv(16)
        assert answer, "the server of warm interpreters has ended"
        return int(answer)

    def close(self) -> None:
        """Ends the server, and with it whatever was left running."""
        self._requests.close()
        self._server.wait()


@functools.cache
def _client() -> _Client:
    client = _Client()
    atexit.register(client.close)
    return client


class _Server:
    """Forks for each request, and says how each child ended."""

    def __init__(self, requests: socket.socket) -> None:
        self._requests = requests
        self._children: dict[int, socket.socket] = {}
        self._wake, self._waker = socket.socketpair()
        for end in (self._wake, self._waker):
            end.setblocking(False)
        # The signal's number is written to the waker; the handler itself has nothing to do.
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def serve(self) -> dict[str, Any] | None:
        """Returns in each child what it is to do, and None in the server at its end."""
        while True:
            ready, _, _ = select.select([self._requests, self._wake], [], [])
            if self._wake in ready:
                self._wake.recv(4096)
                self._bury()
            if self._requests in ready:
                data, descriptors, _, _ = socket.recv_fds(self._requests, _MOST, 4)
                if not data:
                    break
                if self._fork(descriptors):
                    return json.loads(data)
        for pid in self._children:
            os.kill(pid, signal.SIGKILL)
        return None

    def _fork(self, descriptors: list[int]) -> bool:
        """Whether this is the child."""
        ended, *standard = descriptors
        pid = os.fork()
        if pid == 0:
            self._become_child(ended, standard)
            return True
        for descriptor in standard:
            os.close(descriptor)
        self._children[pid] = socket.socket(fileno=ended)
        self._requests.send(str(pid).encode())
        return False

    def _become_child(self, ended: int, standard: list[int]) -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for end in (self._requests, self._wake, self._waker, *self._children.values()):
            end.close()
        os.close(ended)
        for number, descriptor in enumerate(standard):
            os.dup2(descriptor, number)
        for descriptor in standard:
            os.close(descriptor)

    def _bury(self) -> None:
        while self._children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            with self._children.pop(pid) as ended, contextlib.suppress(BrokenPipeError):
                ended.send(str(os.waitstatus_to_exitcode(status)).encode())


def _open_standard_streams() -> None:
    """Makes what the interpreter makes of descriptors 0 to 2 when it starts."""
    for name, number in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
        raw = io.FileIO(number, "r" if number == 0 else "w", closefd=False)
        stream = io.TextIOWrapper(
            io.BufferedReader(raw) if number == 0 else io.BufferedWriter(raw),
            encoding="utf-8",
            errors="backslashreplace" if number == 2 else "strict",
            line_buffering=number == 2 or os.isatty(number),
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def main(descriptor: int) -> None:
    """Imports the libraries and serves; in a child it goes on as the program that was asked for."""
    sys.path.remove(str(TESTS))
    for name in LIBRARIES:
        # An extra that is not installed is not imported by the program either.
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    # As in a new interpreter; Opacus writes a line while it is imported, which adds a handler.
    logging.root.handlers.clear()
    threads = len(list(Path("/proc/self/task").iterdir()))
    assert threads == 1, "a library started a thread, which no child would have"
    gc.collect()
    gc.freeze()
    # What the libraries undo at their exit costs a child more than many a program's own work.
    for finalizer in list(vars(weakref.finalize)["_registry"]):
        finalizer.atexit = False
    task = _Server(socket.socket(fileno=descriptor)).serve()
    if task is None:
        return
    os.chdir(task["folder"])
    os.environ.clear()
    os.environ.update(task["environment"])
    _open_standard_streams()
    code = _exit_code(task["arguments"])
    # The end of an interpreter, but for freeing the libraries: that takes most of a second.
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _exit_code(arguments: list[str]) -> int:
    """Runs a program to its end, as `python ARGUMENTS` does."""
    safe = arguments[0] == "-P"
    first, *rest = arguments = arguments[safe:]
    try:
        if first == "-m":
            if not safe:
                sys.path.insert(0, os.getcwd())
            name, *sys.argv[1:] = rest
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(first).parent))
            sys.argv[:] = arguments
            runpy.run_path(first, run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException as error:
        traceback.print_exc()
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        return 1
    return 0


if __name__ == "__main__":
    main(int(sys.argv[1]))
