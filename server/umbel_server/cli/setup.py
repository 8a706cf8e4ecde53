"""`umbel-server init` and `renew`: the operator's own files, and the certificates in them."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from umbel_common.address import require_reachable
from umbel_common.trust.identity import fingerprint
from umbel_host.terminal import Screen, enter_folder, name, print_lines, say
from umbel_server.cli.options import SERVER_TOML, Config
from umbel_server.operator.certificates import good_until
from umbel_server.operator.config import load_config, load_roster
from umbel_server.operator.files import renew_authority, renew_server, set_up


def renew(
    config: Config = SERVER_TOML,
    authority: Annotated[
        bool, typer.Option("--authority", help="Renew the authority's own certificate instead.")
    ] = False,
) -> None:
    """Give the server itself a new certificate; restart it afterwards."""
    settings, console = load_config(config), Screen()
    if authority:
        renewed = renew_authority(settings, load_roster(settings).roster.federation)
        print_lines(console, [("authority", good_until(renewed, datetime.now(UTC)))])
        console.print(
            "\nThe port uses it after a restart of umbel-server run; sites get it with their next\n"
            "kit (umbel-server sites renew), and need it before the former one expires.",
            soft_wrap=True,
        )
        return
    renewed = renew_server(settings)
    print_lines(console, [("certificate", good_until(renewed, datetime.now(UTC)))])
    say("\nThe port uses it after a restart of umbel-server run; no site has to do anything.")


def _address(value: str) -> str:
    try:
        require_reachable(value)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return value


def init(
    federation: Annotated[str, typer.Option(callback=name, help="Name of the federation.")],
    address: Annotated[
        str, typer.Option(callback=_address, help="host:port that sites connect to.")
    ],
    folder: Annotated[Path, typer.Option(help="A new folder.")] = Path("operator"),
) -> None:
    """Create an operator: identity, certificate authority, server certificate, configuration."""
    identity = set_up(folder, federation, address)
    console = Screen()
    print_lines(
        console,
        [
            ("federation", federation),
            ("fingerprint", fingerprint(identity.public_key)),
            ("configuration", str(folder / "server.toml")),
        ],
    )
    console.print(
        "\nRead the fingerprint out to each site: its people recognise this operator by it.\n"
        "identity.pem and ca/key.pem stay on this machine; keep a copy of both offline."
        f"{enter_folder(folder)}",
        soft_wrap=True,
    )


def register(app: typer.Typer) -> None:
    """Adds these commands to `umbel-server`."""
    app.command()(init)
    app.command()(renew)
