"""Every command of Umbel, as the typer apps have it: one that is added is among them at once.

As a program it runs each one of a list in a fork of its own, as a user who owns nothing:
`python every_command.py FOLDER...`, and prints what each printed and ended with as JSON.
"""

import importlib
import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path

import click
import typer

SCRIPTS = {
    "umbel-client": "umbel_client.cli.command",
    "umbel-server": "umbel_server.cli.command",
    "umbel-simulate": "umbel_simulations.cli.command",
}
MADE = ("out", "new", "folder")
"""Parameters that name what a command makes."""
VALUES = {
    "federation": "clinics",
    "site": "hospital-a",
    "address": "localhost:9443",
    "scenario": "scenario.toml",
    "data_set": "0" * 64,
    "by": "record",
    "public_size": "1000",
}
NOBODY = 65534
_LONGEST = 60


def commands(script: str) -> Iterator[tuple[str, click.Command]]:
    """(words, command) of each command of a script."""

    def within(words: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
        inner = getattr(command, "commands", None)
        if inner is None:
            yield words, command
        for name, child in sorted((inner or {}).items()):
            yield from within(f"{words} {name}", child)

    app = importlib.import_module(SCRIPTS[script]).app
    yield from within(script, typer.main.get_command(app))


def given(command: click.Command) -> list[str]:
    """Values for what a command cannot do without: files that are there, and names for new ones."""
    words = []
    for parameter in command.params:
        if not parameter.required and not isinstance(parameter, click.Argument):
            continue
        value = VALUES.get(parameter.name or "", "closed.json")
        if parameter.name in MADE:
            value = f"made-by-{command.name}"
        words += [parameter.opts[-1], value] if isinstance(parameter, click.Option) else [value]
    return words


def every_command() -> list[list[str]]:
    """Each command with what it cannot do without."""
    return [
        [*words.split(), *given(command)]
        for script in SCRIPTS
        for words, command in commands(script)
    ]


def _printed_by(words: list[str]) -> tuple[int, str]:
    """Exit code and output of a command, in this process."""
    from umbel_host.entry import exit_code

    app = importlib.import_module(SCRIPTS[words[0]]).app
    sys.argv = words
    with tempfile.TemporaryFile("w+") as printed:
        for number in (1, 2):
            os.dup2(printed.fileno(), number)
        signal.alarm(_LONGEST)
        try:
            code = exit_code(app)
        except BaseException:
            code = 99
            traceback.print_exc()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        printed.seek(0)
        return code, printed.read()


def as_another_user(folder: Path, found: list[list[str]]) -> list[dict[str, object]]:
    """What commands printed and ended with, as a user who owns nothing of the folder."""
    with tempfile.TemporaryFile("w+") as answer:
        child = os.fork()
        if child == 0:
            os.chdir(folder)
            if os.geteuid() == 0:
                os.setgroups([])
                os.setresgid(NOBODY, NOBODY, NOBODY)
                os.setresuid(NOBODY, NOBODY, NOBODY)
            for words in found:
                code, said = _printed_by(words)
                entry = {"words": words, "folder": str(folder), "code": code, "said": said}
                answer.write(json.dumps(entry) + "\n")
                answer.flush()
            os._exit(0)
        os.waitpid(child, 0)
        answer.seek(0)
        return [json.loads(line) for line in answer]


if __name__ == "__main__":
    os.umask(0o022)
    # `doctor` gives its network away for good.
    found = sorted(every_command(), key=lambda words: words[1] == "doctor")
    # What commands import when they run: the other user may not be able to read it.
    for module in (
        *("umbel_client.cli.doctor", "umbel_client.curation.report", "umbel_client.curation.split"),
        *("umbel_client.training.local", "umbel_client.evaluation.inference"),
        *("umbel_client.models.adapters.merge", "umbel_client.training.trial"),
        *("umbel_simulations.runs.run", "umbel_simulations.audit.one_run"),
        *("umbel_simulations.backends.processes", "umbel_simulations.runs.verify"),
    ):
        importlib.import_module(module)
    done = [one for folder in sys.argv[1:] for one in as_another_user(Path(folder), found)]
    print(json.dumps(done))
