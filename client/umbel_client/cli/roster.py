"""`umbel-client roster`: whom this site believes. Only `approve` and `revoke` change it."""

import re
from pathlib import Path
from typing import Annotated

import typer

from umbel_client.cli.options import CLIENT_TOML, Config, Json
from umbel_client.cli.roster_view import print_change, print_roster, roster_json
from umbel_client.site.config import ClientConfig, load_config
from umbel_client.site.pinned_roster import (
    find_document,
    pin,
    require_document,
    revoke_here,
    revoke_signed,
)
from umbel_common.errors import IdentityError, UmbelError
from umbel_common.trust.identity import Roster, fingerprint, is_fingerprint_of
from umbel_common.trust.pinning import check_change, merge, propose
from umbel_common.trust.roster import RosterChange, RosterDocument, compare
from umbel_common.trust.roster_file import (
    document_from_json,
    document_to_json,
    revocation_from_json,
    rotation_from_json,
)
from umbel_host.files.keys import read_identity
from umbel_host.files.text_file import read_text, write_new_text
from umbel_host.terminal import Screen, confirm, print_json, print_lines

roster = typer.Typer(
    help="The parties that this site believes: show, diff, approve, propose, revoke.",
    no_args_is_help=True,
)

_RESTART = (
    "A trainer believes what was pinned when it started: if umbel-client run is running, stop it\n"
    "and start it again (umbel-client status says whether that is needed)."
)
RosterFile = Annotated[Path, typer.Argument(help="The proposed roster file.")]


@roster.command()
def show(
    file: Annotated[
        Path | None, typer.Argument(help="A roster file; default: the pinned one.")
    ] = None,
    config: Config = CLIENT_TOML,
    as_json: Json = False,
) -> None:
    """Show a roster with everyone's fingerprint."""
    settings = load_config(config)
    document = require_document(Path(settings.roster)) if file is None else _read(file)
    if as_json:
        print_json(roster_json(document, settings.site))
    else:
        print_roster(Screen(), document, settings.site)


@roster.command()
def diff(file: RosterFile, config: Config = CLIENT_TOML) -> None:
    """Show what approving a roster would change, and change nothing."""
    settings, proposed = load_config(config), _read(file)
    former = find_document(Path(settings.roster))
    merged = merge(former, proposed, file)
    _print_proposal(settings, former, proposed, merged, compare(former, merged))


@roster.command()
def approve(
    file: RosterFile,
    config: Config = CLIENT_TOML,
    digest: Annotated[
        str | None,
        typer.Option(
            help="Approve without asking, but only a roster with this digest, 64 hexadecimal"
            " digits."
        ),
    ] = None,
    accept_new_key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Name of a party that lost its key, after you compared its new fingerprint; may be"
            " repeated.",
        ),
    ] = None,
) -> None:
    """Show how a roster differs from the pinned one, and pin it if you type yes."""
    settings, proposed = load_config(config), _read(file)
    path = Path(settings.roster)
    former = find_document(path)
    merged = merge(former, proposed, file)
    change = compare(former, merged)
    _print_proposal(settings, former, proposed, merged, change)
    check_change(
        merged,
        change,
        site=settings.site,
        own_key=read_identity(Path(settings.identity)).public_key,
        accepted_new_keys=accept_new_key or (),
        file=file,
    )
    console = Screen()
    if digest is not None:
        _require_digest(merged.roster, digest, file)
    if merged == former:
        console.print("\nThis roster is pinned already: nothing to change.")
        return
    if digest is None:
        # Only a person who sees the change and types yes approves it.
        confirm(
            console,
            "Type yes to approve: ",
            unattended=IdentityError(
                "a roster is approved by a person at a terminal, or by its digest",
                file=file,
                remedy="run this at a terminal, or add --digest with the digest that you"
                " compared; nothing was changed",
            ),
            declined=UmbelError("the roster was not approved: nothing was changed", file=file),
        )
    kept = pin(path, former, merged)
    lines = [("pinned", str(path)), ("digest", merged.roster.digest().hex())]
    print_lines(console, [*lines, *([("before", str(kept))] if kept else [])])
    if former is not None:
        console.print(f"\n{_RESTART}", soft_wrap=True)


@roster.command("propose")
def propose_command(
    rotation: Annotated[Path, typer.Argument(help="The rotation file of a party.")],
    out: Annotated[Path, typer.Option(help="The new roster file.")],
    config: Config = CLIENT_TOML,
) -> None:
    """Make a roster from the pinned one and a rotation; approve it like any other."""
    former = require_document(Path(load_config(config).roster))
    signed = rotation_from_json(read_text(rotation), rotation)
    proposed = propose(former, signed, rotation)
    write_new_text(out, document_to_json(proposed))
    lines = [("proposal", str(out)), ("digest", proposed.roster.digest().hex())]
    print_lines(Screen(), lines)


@roster.command()
def revoke(
    file: Annotated[Path | None, typer.Argument(help="A revocation file; or give --key.")] = None,
    key: Annotated[
        str | None,
        typer.Option(
            help="Instead of a file, by your own decision: a fingerprint, or a public key of 64"
            " hexadecimal digits."
        ),
    ] = None,
    config: Config = CLIENT_TOML,
) -> None:
    """Stop believing a key, for good."""
    path = Path(load_config(config).roster)
    if file is not None and key is None:
        signed = revocation_from_json(read_text(file), file)
        revoked = signed.revocation.key
        revoke_signed(path, signed, file)
    elif key is not None and file is None:
        revoked = _find_key(require_document(path), key, path)
        revoke_here(path, revoked)
    else:
        raise typer.BadParameter("give either a revocation file or --key")
    document = require_document(path)
    owners = [name for name, own in document.parties().items() if own == revoked]
    console = Screen()
    print_lines(
        console,
        [
            ("revoked", fingerprint(revoked)),
            ("key of", owners[0] if owners else "nobody in the roster"),
            ("pinned", str(path)),
        ],
    )
    for party, own in document.parties().items():
        if document.leads(party, revoked, own):
            console.print(
                f"\nThe revoked key passed {party} to a key that is still believed:\n"
                f"{fingerprint(own)}. If the key was stolen, that may be the thief's:\n"
                f"compare it with {party}, and revoke it too if it is not theirs.",
                soft_wrap=True,
            )
    console.print(f"\n{_RESTART}", soft_wrap=True)


def _read(file: Path) -> RosterDocument:
    return document_from_json(read_text(file), file)


def _print_proposal(
    settings: ClientConfig,
    former: RosterDocument | None,
    proposed: RosterDocument,
    merged: RosterDocument,
    change: RosterChange,
) -> None:
    console = Screen()
    if former is None:
        console.print("No roster is pinned yet: compare each fingerprint with its owner.\n")
        print_roster(console, merged, settings.site)
    else:
        print_change(console, former, merged, change)
    for key in sorted(set(proposed.revoked_here) - merged.revoked()):
        console.print(
            f"The sender of this file revoked {fingerprint(key)} by its own\n"
            "decision. This site does not, unless you revoke it too: ask the sender why.",
            soft_wrap=True,
        )


def _require_digest(proposed: Roster, digest: str, file: Path) -> None:
    if proposed.digest().hex() != digest.lower():
        raise IdentityError(
            "a roster is not the one that was to be approved",
            file=file,
            field="--digest",
            found=proposed.digest().hex(),
            accepted=digest.lower(),
            remedy="compare the digest with the other parties again; nothing was changed",
        )


def _find_key(document: RosterDocument, text: str, path: Path) -> bytes:
    if re.fullmatch(r"[0-9a-fA-F]{64}", text):
        return bytes.fromhex(text)
    rotations = (signed.rotation for signed in document.rotations)
    known = {
        *document.parties().values(),
        *(key for rotation in rotations for key in (rotation.old_key, rotation.new_key)),
    }
    for key in known:
        if is_fingerprint_of(text, key):
            return key
    raise IdentityError(
        "no key of the pinned roster has this fingerprint",
        file=path,
        field="--key",
        found=text,
        accepted="a fingerprint that `umbel-client roster show` prints, or 64 hexadecimal digits",
    )
