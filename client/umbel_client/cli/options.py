"""Options that several commands of `umbel-client` take."""

from pathlib import Path
from typing import Annotated

import typer

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
