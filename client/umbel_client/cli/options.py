"""Options that several commands of `umbel-client` take, and the one form of `--json`."""

from pathlib import Path
from typing import Annotated

import typer

from umbel_host.terminal import json_text, say

Config = Annotated[Path, typer.Option(help="This site's client.toml.")]

CLIENT_TOML = Path("client.toml")

Device = Annotated[
    str | None,
    typer.Option(help="auto, cpu, cuda, cuda:1, mps, ...; default: model.device of client.toml."),
]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]

JsonWithInfinity = Annotated[
    bool, typer.Option("--json", help="Print one JSON document; null means infinite.")
]


def print_json(value: object) -> None:
    """Prints a value for programs, indented."""
    say(json_text(value))
