"""`umbel-client keygen`, `fingerprint`, `rotate` and `revoke`: a site's own keys."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from umbel_common.errors import StorageError
from umbel_common.trust.identity import Identity, fingerprint
from umbel_common.trust.key_statements import revoke as sign_revocation
from umbel_common.trust.key_statements import rotate as sign_rotation
from umbel_common.trust.roster_file import revocation_to_json, rotation_to_json
from umbel_host.files.keys import read_identity, write_identity
from umbel_host.files.text_file import write_new_text
from umbel_host.terminal import Screen, name, print_lines

Federation = Annotated[
    str, typer.Option(callback=name, help="Name of the federation, as in the roster.")
]


def keygen(
    out: Annotated[Path, typer.Option(help="The new key file.")] = Path("identity.pem"),
) -> None:
    """Make this site's identity: a private key that stays here."""
    write_identity(out, Identity.generate(os.urandom))
    console = Screen()
    _print_key(console, out)
    console.print(
        "\nThe key file stays on this machine: no command sends it anywhere. Give the\n"
        "operator the public key. When the roster comes, read the fingerprint out to\n"
        "the others and compare theirs, before you approve it."
    )


def fingerprint_command(
    file: Annotated[Path, typer.Argument(help="A key file of this site.")],
) -> None:
    """Show the fingerprint and the public key of a key file, to read out to others."""
    _print_key(Screen(), file)


def rotate(
    old: Annotated[Path, typer.Option(help="The key file that was in use until now.")],
    new: Annotated[Path, typer.Option(help="The new key file, which this command makes.")],
    federation: Federation,
    site: Annotated[
        str, typer.Option(callback=name, help="This site's name in the roster, or `operator`.")
    ],
    out: Annotated[Path, typer.Option(help="The new file with the rotation, to send to everyone.")],
) -> None:
    """Replace your key by a new one, with a statement that the old key signs."""
    former, successor = read_identity(old), Identity.generate(os.urandom)
    signed = sign_rotation(federation, site, former, successor)
    write_identity(new, successor)
    try:
        write_new_text(out, rotation_to_json(signed))
    except StorageError:
        # Nobody knows the new key yet: the same command can be given again.
        new.unlink()
        raise
    console = Screen()
    print_lines(
        console,
        [
            ("old key", fingerprint(former.public_key)),
            ("new key", fingerprint(successor.public_key)),
            ("key file", str(new)),
            ("rotation", str(out)),
        ],
    )
    console.print(
        f"\nSend {out} to the operator and every site.\n"
        "Keep the old key file until all have approved the roster with the new key.",
        soft_wrap=True,
    )


def revoke(
    identity: Annotated[Path, typer.Option(help="The key file that signs the revocation.")],
    federation: Federation,
    out: Annotated[
        Path, typer.Option(help="The new file with the revocation, to send to everyone.")
    ],
    key: Annotated[
        str | None,
        typer.Option(
            help="As the operator: another party's public key, 64 hexadecimal digits; default: your"
            " own key."
        ),
    ] = None,
) -> None:
    """Revoke a key for good: your own or, as the operator, another party's."""
    signer = read_identity(identity)
    revoked = signer.public_key if key is None else _public_key(key)
    write_new_text(out, revocation_to_json(sign_revocation(federation, revoked, signer)))
    console = Screen()
    print_lines(
        console,
        [
            ("revoked", fingerprint(revoked)),
            ("signed by", fingerprint(signer.public_key)),
            ("revocation", str(out)),
        ],
    )
    console.print(
        f"\nSend {out} to the operator and every site.\n"
        "Once they know it, the key never counts again, nor does a rotation that it signed.",
        soft_wrap=True,
    )


def _public_key(text: str) -> bytes:
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != 32:
        raise typer.BadParameter("a public key has 64 hexadecimal digits", param_hint="--key")
    return key


def _print_key(console: Console, file: Path) -> None:
    key = read_identity(file).public_key
    lines = [("key file", str(file)), ("fingerprint", fingerprint(key)), ("public key", key.hex())]
    print_lines(console, lines)


def register(app: typer.Typer) -> None:
    """Adds these commands to `umbel-client`."""
    app.command()(keygen)
    app.command("fingerprint")(fingerprint_command)
    app.command()(rotate)
    app.command()(revoke)
