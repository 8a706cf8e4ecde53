"""`umbel-client backup` and `restore`: a site's state into one file, and back again."""

from pathlib import Path
from typing import Annotated

import typer

from umbel_client.cli.options import CLIENT_TOML, Config
from umbel_client.ledger.spending import charged_text
from umbel_client.storage.backup import back_up
from umbel_client.storage.backup import restore as put_back
from umbel_host.files.restore import Intent, Signer, Unsigned, require_consent
from umbel_host.terminal import Screen, print_lines


def backup(
    out: Annotated[Path, typer.Option(help="The new file; only its owner can read it.")],
    config: Config = CLIENT_TOML,
    with_keys: Annotated[
        bool,
        typer.Option("--with-keys", help="Include the private keys; the file is then a secret."),
    ] = False,
) -> None:
    """Write ledger, journal, decisions and configuration into one file; the site may be running."""
    manifest, contents = back_up(config, out, keys=with_keys)
    print_lines(
        Screen(),
        [
            ("backup", str(out)),
            ("site", manifest.party),
            ("made", manifest.made),
            ("ledger", f"{charged_text(contents)}, head {contents.head().hex()}"),
            ("keys", "in it: keep it like the keys" if with_keys else "not in it (--with-keys)"),
        ],
    )


def restore(
    backup: Annotated[Path, typer.Argument(metavar="BACKUP", help="A file that `backup` wrote.")],
    config: Config = CLIENT_TOML,
    signer: Signer = None,
    unsigned: Unsigned = False,
) -> None:
    """Restore a backup into an empty state folder: all of it or nothing."""
    console = Screen()

    def consent(intent: Intent) -> None:
        who = ("site", intent.manifest.party)
        require_consent(console, who, intent, expected=signer, unsigned=unsigned)

    put_back(backup, config, consent)
    console.print(
        "\nThe ledger is as it was then. Nothing is trained until you state what was spent\n"
        "since: umbel-client budget state-spend (docs/budget.md).\n\n"
        "Whatever else was put back is as it was then too. Repeat each revocation, and\n"
        "each change of client.toml, that you made since."
    )


def register(app: typer.Typer) -> None:
    """Adds these commands to `umbel-client`."""
    for command in (backup, restore):
        app.command()(command)
