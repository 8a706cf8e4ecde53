"""`umbel-server backup` and `restore`: an operator's state in one file."""

from pathlib import Path
from typing import Annotated

import typer

from umbel_host.files.restore import Intent, Signer, Unsigned, require_consent
from umbel_host.terminal import Screen, print_lines
from umbel_server.cli.options import SERVER_TOML, Config
from umbel_server.storage.backup import back_up, restore_backup


def backup(
    out: Annotated[Path, typer.Option(help="The new file; only its owner can read it.")],
    config: Config = SERVER_TOML,
    with_keys: Annotated[
        bool,
        typer.Option("--with-keys", help="Include the private keys; the file is then a secret."),
    ] = False,
) -> None:
    """Write journal, queue, releases and configuration into one file; the server may be running."""
    manifest = back_up(config, out, keys=with_keys)
    print_lines(
        Screen(),
        [
            ("backup", str(out)),
            ("operator", manifest.party),
            ("made", manifest.made),
            (
                "keys",
                "in it: keep it like the keys" if with_keys else "not in it (--with-keys)",
            ),
        ],
    )


def restore(
    backup: Annotated[Path, typer.Argument(metavar="BACKUP", help="A file that `backup` wrote.")],
    config: Config = SERVER_TOML,
    signer: Signer = None,
    unsigned: Unsigned = False,
) -> None:
    """Restore a backup into an empty state folder: all of it or nothing."""
    console = Screen()

    def consent(intent: Intent) -> None:
        who = ("operator", intent.manifest.party)
        require_consent(console, who, intent, expected=signer, unsigned=unsigned)

    stopped = restore_backup(backup, config, consent)
    console.print(f"\nstopped: {', '.join(stopped) or 'no job, none was running'}")
    console.print(
        "\nA job that released something since the backup cannot be resumed: sites accept\n"
        "no second release of a round. Resume others with umbel-server job resume JOB.\n\n"
        "The roster and the list of sites that were put back are as they were then.\n"
        "Before you start the server, revoke again whom you revoked since: it would be\n"
        "admitted."
    )


def register(app: typer.Typer) -> None:
    """Adds these commands to `umbel-server`."""
    for command in (backup, restore):
        app.command()(command)
