"""Processes that belong together, each started again when it dies.

This is for people who run Umbel without a service manager. A service manager starts the same
processes itself, each under a user of its own.
"""

import ctypes
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

_FIRST_PAUSE = 1.0
_LONGEST_PAUSE = 30.0
_SETTLED_SECONDS = 60.0
"""Run time after which a process is started again with the first, shortest pause."""
_LOOK_SECONDS = 0.2
_OWN_FAULTS = frozenset({2, *range(10, 40), *range(50, 60)})
"""Exit codes of a command line, of files and of decisions of this machine (docs/errors.md). The
other side cannot bring about any of them: what it sends can at worst show a mistake of ours (1) or
break the protocol (40 to 49), and decides not when processes end for good."""
_PR_SET_PDEATHSIG = 1

_logger = logging.getLogger("umbel.supervisor")


def our_module(module: str, *arguments: str, python: str = sys.executable) -> list[str]:
    """The command line that starts a module of ours.

    With `-P`, Python looks for modules only where packages are installed. Otherwise it would look
    first into the working folder: there lie files that other parties sent.
    """
    return [python, "-P", "-m", module, *arguments]


@dataclass(frozen=True)
class Command:
    """A process to keep running: a module of ours, in this Python."""

    name: str
    module: str
    arguments: tuple[str, ...]


class _Child:
    def __init__(self, command: Command) -> None:
        self.name = command.name
        self._command = our_module(command.module, *command.arguments)
        self._pause = 0.0
        self.process = self._start()

    def look_after(self) -> int | None:
        """Starts the process again if it died; returns its exit code if it must not be started."""
        code = self.process.poll()
        now = time.monotonic()
        if code is None:
            return None
        if self._died is None:
            lived = now - self._started
            if code in _OWN_FAULTS and self._pause == 0.0 and lived < _SETTLED_SECONDS:
                # The process said what is wrong with its files, and would say it again.
                return code
            again = 0.0 if lived >= _SETTLED_SECONDS else self._pause
            self._pause = min(max(2 * again, _FIRST_PAUSE), _LONGEST_PAUSE)
            self._died = now
            _logger.warning("%s ended (%d): again in %.0f s", self.name, code, self._pause)
        elif now >= self._died + self._pause:
            self.process = self._start()
        return None

    def _start(self) -> subprocess.Popen[bytes]:
        self._started, self._died = time.monotonic(), None
        process = subprocess.Popen(self._command, preexec_fn=belong_to_parent)  # noqa: S603
        _logger.info("%s is process %d", self.name, process.pid)
        return process

    _started: float
    _died: float | None


def supervise(commands: Sequence[Command], *, stopping_seconds: float = 60.0) -> int:
    """Keeps the processes running until SIGTERM or SIGINT, then ends them; in the main thread.

    A process that a signal killed, or that ended after it had run for a while, is started again,
    after a pause that grows to half a minute. If a process fails at its first start for a reason of
    this machine's own, all are ended.

    Returns:
        0, or the exit code of the process that failed.
    """
    told = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: told.set())
    children: list[_Child] = []
    code: int | None = None
    try:
        for command in commands:
            children.append(_Child(command))
        while code is None and not told.wait(_LOOK_SECONDS):
            codes = [child.look_after() for child in children]
            code = next((code for code in codes if code is not None), None)
    finally:
        _end([child.process for child in reversed(children)], stopping_seconds)
        _logger.info("stopped")
    return code or 0


def _end(processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + seconds
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


_libc = ctypes.CDLL(None)


def belong_to_parent() -> None:
    """Lets only the parent end a child; to be called between fork and exec.

    A terminal's Ctrl-C goes to parent and child, and only the parent shall speak and decide. And a
    parent that is killed leaves no process behind that holds what its successor needs.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(_libc, "prctl"):
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


_BOUND = f"""\
import ctypes, os, sys
libc = ctypes.CDLL(None)
if hasattr(libc, "prctl"):
    libc.prctl({_PR_SET_PDEATHSIG}, {signal.SIGTERM:d})
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent has ended")
try:
    os.execv(sys.argv[2], sys.argv[2:])
except OSError as error:
    sys.exit(f"{{sys.argv[2]}}: {{error.strerror}}")
"""


def bound_to_parent(command: Sequence[str]) -> list[str]:
    """The command of a child of this process that ends when this process dies.

    A process with threads, such as gRPC's, has to start its children by this. With code between
    fork and exec, as `belong_to_parent`, the child's copy of gRPC fails at times and aborts it.
    """
    return [sys.executable, "-I", "-S", "-c", _BOUND, str(os.getpid()), *command]
