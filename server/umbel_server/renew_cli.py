"""`umbel-server renew`: the certificates of the server and of its authority."""

from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.console import Console

from umbel_host.console import print_lines
from umbel_server.config import load_config, load_roster
from umbel_server.expiry import good_until
from umbel_server.operator_files import renew_authority, renew_server
from umbel_server.sites_cli import SERVER_TOML, Config


def renew(
    config: Config = SERVER_TOML,
    authority: Annotated[
        bool, typer.Option("--authority", help="The authority's own certificate instead.")
    ] = False,
) -> None:
    """Give the server itself a new certificate; restart it afterwards."""
    settings, console = load_config(config), Console(highlight=False)
    if authority:
        renewed = renew_authority(settings, load_roster(settings).roster.federation)
        print_lines(console, [("authority", good_until(renewed, datetime.now(UTC)))])
        console.print(
            "\nThe port has it after a restart of umbel-server run; sites get it with their next\n"
            "kit (umbel-server sites renew), and must have it before the former one ends.",
            soft_wrap=True,
        )
        return
    renewed = renew_server(settings)
    print_lines(console, [("certificate", good_until(renewed, datetime.now(UTC)))])
    typer.echo("\nThe port has it after a restart of umbel-server run; no site has to do anything.")
