"""Options that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

Config = Annotated[Path, typer.Option(help="The operator's server.toml.")]

SERVER_TOML = Path("server.toml")
