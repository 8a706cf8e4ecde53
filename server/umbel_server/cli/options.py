"""Options that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

Config = Annotated[Path, typer.Option(help="The operator's server.toml.")]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]

SERVER_TOML = Path("server.toml")
Unchecked = Annotated[
    bool, typer.Option("--unchecked", help="Sign a plan whose base model nobody has loaded.")
]
