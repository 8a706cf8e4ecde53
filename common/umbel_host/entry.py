"""How a program of ours begins and ends: with a documented exit code, whatever happens to it.

The invariant: no traceback reaches a person who did not ask for it with UMBEL_TRACEBACK=1. It may
quote a record or another party, and says nothing to a reader who does not know the code.

Nothing that takes time is imported above: a program enters before it imports the rest, and from
then on Ctrl-C ends it with one word. Until then, Ctrl-C is the interpreter's.
"""

import os
import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import threading
    from collections.abc import Callable
    from types import FrameType
    from typing import NoReturn

    from umbel_common.errors import UmbelError

INTERRUPTED = 130
MISTAKE = 1
TRACEBACK = "UMBEL_TRACEBACK"
"""The environment variable that shows what a mistake of ours was, in full."""

_OURS = "umbel_"
_told: list[int] = []
"""Each Ctrl-C that this process was told of as it ran a command."""


def enter(program: "Callable[[], int]") -> "NoReturn":
    """Runs a program to its end, and ends this process with its exit code.

    Args:
        program: imports what it needs, and returns what `exit_code` returned.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end_at_once)

    _open_standard_streams()

    import threading

    threading.excepthook = _in_a_thread
    sys.unraisablehook = _nowhere_to_raise
    code = _ended(program, "interrupted")
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        # What is left to do is the interpreter's, which would print a traceback.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(code)


def enter_command(module: str) -> "NoReturn":
    """Enters the program that is the function `run_command` of a module, which is imported then."""

    def program() -> int:
        from importlib import import_module

        code: int = import_module(module).run_command()
        return code

    enter(program)


def exit_code(command: "Callable[[], None]", *, interrupted: str = "interrupted") -> int:
    """Runs a command and maps its end to the exit codes of docs/errors.md.

    Args:
        interrupted: text to print after Ctrl-C.
    """
    if signal.getsignal(signal.SIGINT) is _end_at_once:
        signal.signal(signal.SIGINT, _raise_interrupt)

    def to_its_end() -> int:
        # A folder that was removed has no name, and so no relative path has a meaning.
        os.getcwd()
        command()
        return 0

    return _ended(to_its_end, interrupted)


def _ended(program: "Callable[[], int]", interrupted: str) -> int:
    try:
        code = program()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        return code
    except KeyboardInterrupt:
        return _interrupted(interrupted)
    except SystemExit as end:
        # Typer turned Ctrl-C into this code.
        if _told or end.code == INTERRUPTED:
            return _interrupted(interrupted)
        return _flushed(end.code if isinstance(end.code, int) else 1 if end.code else 0)
    except Exception as error:
        # A library may make another error of it that it was interrupted.
        if _told:
            return _interrupted(interrupted)
        return _failed(error)


def _flushed(code: int) -> int:
    """Typer ends a command in this way, and leaves to the interpreter what is not written yet."""
    try:
        sys.stdout.flush()
    except OSError as error:
        return _failed(error)
    return code


def _interrupted(text: str) -> int:
    _print(text)
    _let_go_of_output()
    return INTERRUPTED


def _failed(error: Exception) -> int:
    """Says what went wrong; returns the exit code."""
    if isinstance(error, BrokenPipeError) and error.filename is None:
        # The reader of the output has seen enough, as `head` has.
        _let_go_of_output()
        return MISTAKE
    from umbel_common.errors import UmbelError

    known = _known(error)
    if os.environ.get(TRACEBACK) and not isinstance(error, UmbelError):
        import traceback

        _print("".join(traceback.format_exception(error)).rstrip())
    _print(f"error: {known.diagnostics()}")
    _let_go_of_output()
    return known.exit_code


def _known(error: Exception) -> "UmbelError":
    """The error of ours that says the same."""
    from umbel_common.errors import ConfigError, UmbelError
    from umbel_host.processes.lifecycle import explained, refused

    if isinstance(error, UmbelError):
        return explained(error)
    if isinstance(error, OSError):
        return refused(error)
    if isinstance(error, ValueError) and "embedded null" in str(error):
        # What Python says of such a path, wherever it came from.
        return ConfigError(
            "no file can have this path",
            found="the character U+0000",
            accepted="a path without it",
        )
    if isinstance(error, MemoryError):
        return UmbelError("this machine has no memory left for what was asked of it")
    if isinstance(error, ImportError) and error.name and not error.name.startswith(_OURS):
        from umbel_host.installation import install

        return ConfigError(
            "this command needs a package that is not installed here, or not as it should be",
            found=error.name,
            remedy=f"install the packages of this machine's role: {install('client')} at a site,"
            f" {install('server')} for an operator",
        )
    return UmbelError(
        f"a mistake of Umbel's: {type(error).__name__} in {_place(error)}",
        remedy=f"please report this line; {TRACEBACK}=1 before the same command shows more, which"
        " may quote your data: read it before you send it to anybody",
    )


def _place(error: BaseException) -> str:
    """The last line of ours that an error came through."""
    place, frame = "Python itself", error.__traceback__
    while frame is not None:
        module = str(frame.tb_frame.f_globals.get("__name__", ""))
        if module.startswith(_OURS) and module != __name__:
            place = f"{module}, line {frame.tb_lineno}"
        frame = frame.tb_next
    return place


def _print(text: str) -> None:
    """Prints to standard error, if anybody reads it still."""
    from umbel_host.terminal import Screen

    try:
        Screen(stderr=True).print(text, soft_wrap=True)
    except (OSError, ValueError):
        return


def _let_go_of_output() -> None:
    """Writes what is not written yet, or else drops it: at its end, the interpreter would try
    again, and print a traceback."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _open_standard_streams() -> None:
    """Opens those that were closed, as with `>&-`: a file would else get their number, and what is
    printed would be written into it."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            # The lowest number that is free, which is that of the stream.
            number = os.open(os.devnull, os.O_RDWR)
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def _end_at_once(number: int, frame: "FrameType | None") -> None:
    """While modules are imported nothing is open, and what libraries make of an interrupt differs:
    one swallows it, another raises an error of its own."""
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)


def _raise_interrupt(number: int, frame: "FrameType | None") -> "NoReturn":
    _told.append(number)
    raise KeyboardInterrupt


def _in_a_thread(arguments: "threading.ExceptHookArgs") -> None:
    if isinstance(arguments.exc_value, Exception):
        _failed(arguments.exc_value)


def _nowhere_to_raise(unraisable: "sys.UnraisableHookArgs") -> None:
    """An error in a finalizer, which can end nothing. An interrupt must not be lost there."""
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        _end_at_once(signal.SIGINT, None)
    if os.environ.get(TRACEBACK):
        sys.__unraisablehook__(unraisable)
