"""`umbel-server sites` and `roster`: admit sites, set their sizes, renew and revoke them."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from umbel_common.errors import IdentityError, StorageError, UmbelError
from umbel_common.trust import identity, key_statements
from umbel_common.trust.enrolment import request_from_json
from umbel_common.trust.identity import Member, fingerprint, is_fingerprint_of
from umbel_common.trust.roster import RosterDocument
from umbel_common.trust.roster_file import document_to_json, revocation_to_json
from umbel_host.files.durable import all_or_nothing, make_folder
from umbel_host.files.keys import read_identity
from umbel_host.files.output import require_new, require_new_file
from umbel_host.files.text_file import read_text, write_new_text
from umbel_host.terminal import Screen, confirm, json_time, print_json, print_lines, table
from umbel_server.cli.options import SERVER_TOML, Config, Json
from umbel_server.operator.admission import Asked, check_renewal, issue, with_sites, with_size
from umbel_server.operator.admitted_sites import SiteEntry, load_sites, save_sites
from umbel_server.operator.certificates import good_until, parse, read, to_renew
from umbel_server.operator.config import ServerConfig, load_config, load_roster
from umbel_server.operator.files import changing, save_roster

sites = typer.Typer(help="Sites: add, list, size, revoke, renew.", no_args_is_help=True)
roster = typer.Typer(help="The operator's roster: export.", no_args_is_help=True)

Out = Annotated[Path, typer.Option(help="The new roster file.")]


@sites.command()
def add(
    requests: Annotated[
        list[Path], typer.Argument(help="The request files of one site or of several.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="The new kit (enrolment bundle) for the site; for several sites, the folder for"
            " their kits. Default: SITE.kit.json here."
        ),
    ] = None,
    config: Config = SERVER_TOML,
    weight: Annotated[
        int,
        typer.Option(
            min=1,
            max=64,
            help="The public size class of each of these sites; by it a plan may weight the sites.",
        ),
    ] = 1,
    public_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=10**9,
            help="About how many records each of these sites says it has, for everybody to know;"
            " umbel-server calibrate uses it.",
        ),
    ] = None,
    expected: Annotated[
        list[str] | None,
        typer.Option(
            "--fingerprint",
            help="Add without asking, but only a site with this fingerprint; once for each site.",
        ),
    ] = None,
) -> None:
    """Admit sites after you have compared each one's fingerprint with its people: one roster with
    all of them, and a kit for each."""
    settings = load_config(config)
    known = load_sites(Path(settings.sites))
    document = load_roster(settings)
    admitted = [Asked(request_from_json(read_text(file), file), file) for file in requests]
    with_sites(document, known, admitted, weight, public_size)
    several = len(admitted) > 1
    kits = {one.site: _kit_path(out, one.site, several=several) for one in admitted}
    for kit in kits.values():
        require_new(kit) if several else require_new_file(kit)
    console = Screen()
    for one in admitted:
        key = one.signed.request.identity
        print_lines(console, [("site", one.site), ("fingerprint", fingerprint(key))])
        _check_fingerprint(console, key, expected, one.file)
    with changing(settings), all_or_nothing() as written:
        # Another command may have added a site while people compared fingerprints.
        known = load_sites(Path(settings.sites))
        document = with_sites(load_roster(settings), known, admitted, weight, public_size)
        if out is not None and several:
            written += _folder(out)
        for one in admitted:
            known[one.site] = issue(settings, one, document, kits[one.site], written)
        save_sites(Path(settings.sites), known)
        # The roster is last: until it is written, the same command can be given again.
        save_roster(settings, document)
    kit_lines = [("kit", str(path)) for path in kits.values()]
    names = ", ".join(member.name for member in document.roster.members)
    roster_lines = [("roster", document.roster.digest().hex()), ("sites", names)]
    print_lines(console, [*kit_lines, *roster_lines])
    console.print(f"\n{_after_adding(document, kits)}", soft_wrap=True)


def _kit_path(out: Path | None, site: str, *, several: bool) -> Path:
    if out is not None and not several:
        return out
    return (out or Path()) / f"{site}.kit.json"


def _folder(path: Path) -> list[Path]:
    """Makes a folder for kits; returns what was made."""
    try:
        return make_folder(path, 0o750)
    except OSError as error:
        raise StorageError(
            "the folder for the kits cannot be made", file=path, found=error.strerror
        ) from None


def _after_adding(document: RosterDocument, kits: dict[str, Path]) -> str:
    """What people do with the kits. The kits of sites that were added before lack these sites."""
    before = [member.name for member in document.roster.members if member.name not in kits]
    if before:
        return (
            "Send each kit to its site, and today's roster (umbel-server roster export) to\n"
            f"{', '.join(before)}, whose kits have an older one: a site refuses every plan\n"
            "until it has approved today's. Running jobs keep the roster they started with."
        )
    return (
        "Send each kit to its site, which approves the roster in it. It has the sites above\n"
        "and no others: if more are to come, add them first, or send everyone the new roster\n"
        "then (umbel-server roster export). Running jobs keep the roster they started with."
    )


def _check_fingerprint(
    console: Console, key: bytes, expected: list[str] | None, file: Path
) -> None:
    if expected:
        if not any(is_fingerprint_of(one, key) for one in expected):
            raise IdentityError(
                "a request is not from the site that you want to add: nothing was changed",
                file=file,
                field="--fingerprint",
                found=fingerprint(key),
                accepted=tuple(expected),
            )
        return
    confirm(
        console,
        "Did its people read out the same fingerprint? Type yes: ",
        unattended=IdentityError(
            "a site is added by a person at a terminal, or by its fingerprint",
            file=file,
            remedy="run this at a terminal, or add --fingerprint with what the site read out to"
            " you; nothing was changed",
        ),
        declined=UmbelError("the site was not added: nothing was changed", file=file),
    )


@sites.command("list")
def list_command(config: Config = SERVER_TOML, as_json: Json = False) -> None:
    """List the sites with their fingerprints and certificates."""
    settings, now = load_config(config), datetime.now(UTC)
    document, known = load_roster(settings), load_sites(Path(settings.sites))
    if as_json:
        print_json([_site_json(document, entry, settings) for entry in known.values()])
        return
    sized = any(records_of(member) for member in document.roster.members)
    headings = ("site", "fingerprint", *(["public size"] if sized else []), "")
    keys = table(*headings, folding=("site", ""))
    certificates = table("site", "certificate", "until", folding=("site", "until"))
    for site, entry in known.items():
        member = document.roster.find(site)
        key = "not in the roster" if member is None else fingerprint(member.public_key)
        size = [records_of(member)] if sized else []
        keys.add_row(site, key, *size, "REVOKED" if entry.revoked else "")
        certificate = parse(entry.certificate.encode(), settings.sites)
        until = "REVOKED" if entry.revoked else good_until(certificate, now)
        certificates.add_row(site, f"{certificate.serial_number:040x}", until)
    console = Screen()
    if known:
        console.print(keys)
        console.print()
        console.print(certificates)
    else:
        console.print("No site was added yet.")
    console.print()
    own, authority = read(Path(settings.listen.certificate)), read(Path(settings.listen.client_ca))
    print_lines(
        console,
        [
            ("the server's own certificate", good_until(own, now)),
            ("the authority's", good_until(authority, now)),
        ],
    )
    for sentence in to_renew(settings, now):
        console.print(f"RENEW SOON: {sentence}", soft_wrap=True)


def records_of(member: Member | None) -> str:
    """A site's public size for people; empty without one."""
    found = None if member is None else identity.public_size(member)
    return "" if found is None else f"{found:,}"


def _site_json(
    document: RosterDocument, entry: SiteEntry, settings: ServerConfig
) -> dict[str, object]:
    member = document.roster.find(entry.name)
    certificate = parse(entry.certificate.encode(), settings.sites)
    return {
        "site": entry.name,
        "fingerprint": None if member is None else fingerprint(member.public_key),
        "weight": None if member is None else member.weight,
        "public_size": None if member is None else identity.public_size(member),
        "in_roster": member is not None,
        "revoked": entry.revoked,
        "certificate": f"{certificate.serial_number:040x}",
        "certificate_ends": json_time(certificate.not_valid_after_utc.timestamp()),
    }


@sites.command()
def size(
    site: Annotated[str, typer.Argument(metavar="NAME", help="Name of the site.")],
    public_size: Annotated[
        int,
        typer.Option(min=1, max=10**9, help="About how many records the site says it has."),
    ],
    config: Config = SERVER_TOML,
) -> None:
    """Set the public size of a site in the roster, which every site then compares and approves.

    The site's people tell you the number, the same as `data.public_size` in their client.toml. It
    helps you choose a plan's numbers (umbel-server calibrate), and no promise depends on it.
    """
    settings = load_config(config)
    with changing(settings):
        document = with_size(load_roster(settings), site, public_size)
        save_roster(settings, document)
    console = Screen()
    lines = [("site", site), ("public size", f"{public_size:,}")]
    print_lines(console, [*lines, ("roster", document.roster.digest().hex())])
    console.print(
        "\nSend today's roster to every site (umbel-server roster export): a site refuses every\n"
        "plan until it has approved it. Running jobs keep the roster they started with.",
        soft_wrap=True,
    )


@sites.command()
def revoke(
    site: Annotated[str, typer.Argument(metavar="NAME", help="Name of the site.")],
    out: Annotated[
        Path, typer.Option(help="The new file with the revocation, to send to every site.")
    ],
    config: Config = SERVER_TOML,
) -> None:
    """Revoke a site for good: its relay at once, its key from the next round on."""
    settings = load_config(config)
    path = Path(settings.sites)
    with changing(settings):
        document, known = load_roster(settings), load_sites(path)
        member = document.roster.find(site)
        if site not in known or member is None:
            raise IdentityError(
                "no site of this name takes part",
                field="NAME",
                found=site,
                accepted=", ".join(sorted(known)) or "none was added",
            )
        if known[site].revoked and member.public_key in document.revoked():
            raise IdentityError("this site is revoked already", field="NAME", found=site)
        operator = read_identity(Path(settings.identity))
        signed = key_statements.revoke(document.roster.federation, member.public_key, operator)
        write_new_text(out, revocation_to_json(signed))
        # The port comes first: whatever fails after this, the relay cannot connect any more.
        save_sites(path, {**known, site: msgspec.structs.replace(known[site], revoked=True)})
        if signed not in document.revocations:
            revocations = (*document.revocations, signed)
            save_roster(settings, msgspec.structs.replace(document, revocations=revocations))
    console = Screen()
    print_lines(
        console,
        [
            ("revoked", site),
            ("fingerprint", fingerprint(member.public_key)),
            ("revocation", str(out)),
        ],
    )
    console.print(
        f"\nIts relay is turned away from now on. Send {out.name} to every other site:\n"
        f"umbel-client roster revoke {out.name}. No site has to approve another roster; the site\n"
        "leaves the roster when the next site is added.",
        soft_wrap=True,
    )


@sites.command()
def renew(
    request: Annotated[Path, typer.Argument(help="The site's request file, the old or a new one.")],
    out: Annotated[Path, typer.Option(help="The new kit (enrolment bundle) for the site.")],
    config: Config = SERVER_TOML,
) -> None:
    """Issue a new certificate to a site, for the same or another relay key; its identity stays."""
    settings = load_config(config)
    asked = Asked(request_from_json(read_text(request), request), request)
    with changing(settings), all_or_nothing() as written:
        document, known = load_roster(settings), load_sites(Path(settings.sites))
        check_renewal(asked, document, known)
        entry = issue(settings, asked, document, out, written)
        save_sites(Path(settings.sites), {**known, entry.name: entry})
    console = Screen()
    print_lines(console, [("site", asked.site), ("kit", str(out))])
    console.print(
        "\nSend the kit to the site: umbel-client join. With the same relay key, the former\n"
        "certificate stays valid until it expires; with another key, it is refused from now on.",
        soft_wrap=True,
    )


@roster.command()
def export(out: Out, config: Config = SERVER_TOML) -> None:
    """Write the roster to a file for the sites, which compare and approve it."""
    document = load_roster(load_config(config))
    write_new_text(out, document_to_json(document))
    lines = [("roster", str(out)), ("digest", document.roster.digest().hex())]
    print_lines(Screen(), lines)


def register(app: typer.Typer) -> None:
    """Adds these commands to `umbel-server`."""
    app.add_typer(sites, name="sites")
    app.add_typer(roster, name="roster")
