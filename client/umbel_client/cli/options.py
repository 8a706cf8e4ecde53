"""Options that several commands of `umbel-client` take."""

from pathlib import Path
from typing import Annotated

import typer

Config = Annotated[Path, typer.Option(help="This site's client.toml.")]

CLIENT_TOML = Path("client.toml")

Json = Annotated[bool, typer.Option("--json", help="One JSON document; null means infinite.")]
