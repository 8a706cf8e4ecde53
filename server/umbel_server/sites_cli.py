"""`umbel-server init`, `sites`, `roster`, `renew`: who takes part, and how they get in."""

import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from cryptography import x509
from rich.console import Console
from rich.table import Table

from umbel_common.enrolment import (
    SignedRequest,
    SiteKit,
    check_request,
    give,
    kit_to_json,
    request_from_json,
)
from umbel_common.errors import IdentityError, UmbelError
from umbel_common.identity import Member, fingerprint
from umbel_common.key_statements import revoke as sign_revocation
from umbel_common.roster_document import RosterDocument
from umbel_common.roster_file import document_to_json, revocation_to_json
from umbel_host.console import print_lines
from umbel_host.keys import read_identity
from umbel_host.options import name
from umbel_host.text_file import read_text, write_new_text
from umbel_server.authority import certificate_pem
from umbel_server.config import ServerConfig, load_config, load_roster
from umbel_server.operator_files import load_authority, renew_server, save_roster, set_up
from umbel_server.sites import SiteEntry, load_sites, save_sites

sites = typer.Typer(help="Sites: add, list, revoke, renew.", no_args_is_help=True)
roster = typer.Typer(help="The operator's roster: export.", no_args_is_help=True)

Config = Annotated[Path, typer.Option(help="The operator's server.toml.")]
SERVER_TOML = Path("server.toml")
Out = Annotated[Path, typer.Option(help="The new file.")]
SOON = timedelta(days=30)


def _address(value: str) -> str:
    host, _, port = value.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise typer.BadParameter("host:port")
    return value


def init(
    federation: Annotated[str, typer.Option(callback=name, help="Name of the federation.")],
    address: Annotated[
        str, typer.Option(callback=_address, help="host:port that sites connect to.")
    ],
    folder: Annotated[Path, typer.Option(help="A new folder.")] = Path("operator"),
) -> None:
    """Make an operator: identity, certificate authority, server certificate, configuration."""
    identity = set_up(folder, federation, address)
    console = Console(highlight=False)
    print_lines(
        console,
        [
            ("federation", federation),
            ("fingerprint", fingerprint(identity.public_key)),
            ("configuration", str(folder / "server.toml")),
        ],
    )
    console.print(
        "\nRead the fingerprint out to each site: it is how they know this operator.\n"
        "identity.pem and ca/key.pem stay on this machine; keep a copy of both offline.",
        soft_wrap=True,
    )


@sites.command()
def add(
    request: Annotated[Path, typer.Argument(help="The site's request file.")],
    out: Annotated[Path, typer.Option(help="The kit for the site, which this makes.")],
    config: Config = SERVER_TOML,
    weight: Annotated[int, typer.Option(min=1, max=64, help="Its public size class.")] = 1,
    expected: Annotated[
        str | None,
        typer.Option("--fingerprint", help="Add without asking, and only the site with this one."),
    ] = None,
) -> None:
    """Admit a site, after you compared its fingerprint with its people."""
    settings = load_config(config)
    asked = request_from_json(read_text(request), request)
    check_request(asked, request)
    document = load_roster(settings)
    _check_new(asked, document, load_sites(Path(settings.sites)), request)
    own = fingerprint(asked.request.identity)
    console = Console(highlight=False)
    print_lines(console, [("site", asked.request.site), ("fingerprint", own)])
    _confirm(console, own, expected, request)
    members = (
        *document.roster.members,
        Member(name=asked.request.site, public_key=asked.request.identity, weight=weight),
    )
    grown = msgspec.structs.replace(
        document.roster, members=tuple(sorted(members, key=lambda member: member.name))
    )
    document = msgspec.structs.replace(document, roster=grown)
    _admit(settings, asked, document, out, request)
    # Last: until it is written, the same command can be given again.
    save_roster(settings, document)
    print_lines(console, [("kit", str(out)), ("roster", document.roster.digest().hex())])
    console.print(
        "\nSend the kit to the site, and the new roster (umbel-server roster export) to all:\n"
        "each site approves it by itself. Jobs under way go on with the roster they began with.",
        soft_wrap=True,
    )


def _check_new(
    asked: SignedRequest, document: RosterDocument, known: dict[str, SiteEntry], file: Path
) -> None:
    request, current = asked.request, document.roster
    if request.federation != current.federation:
        raise IdentityError(
            "a request is for another federation",
            file=file,
            found=request.federation,
            accepted=current.federation,
        )
    if current.find(request.site) is not None:
        raise IdentityError(
            "a site of this name is there already",
            file=file,
            field="site",
            found=request.site,
            remedy="umbel-server sites renew, if it is the same one; else another name",
        )
    keys = {member.public_key for member in current.members} | {current.operator}
    if request.identity in keys | document.revoked():
        raise IdentityError(
            "a request's identity is another party's, or is revoked", file=file, field="identity"
        )
    # One of this name that is not in the roster is left over from a command that was cut short.
    others = (entry for owner, entry in known.items() if owner != request.site)
    if any(request.relay_key == entry.relay_key for entry in others):
        raise IdentityError("a request's relay key is another site's", file=file, field="relay_key")


def _confirm(console: Console, own: str, expected: str | None, file: Path) -> None:
    if expected is not None:
        if expected.strip().lower() != own:
            raise IdentityError(
                "a request is not from the site that was to be added: nothing was changed",
                file=file,
                field="--fingerprint",
                found=own,
                accepted=expected,
            )
        return
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise IdentityError(
            "a site is added by a person at a terminal, or by its fingerprint",
            file=file,
            remedy="run this at a terminal, or add --fingerprint with what the site read out to"
            " you; nothing was changed",
        )
    try:
        answer = console.input("\nDid its people read out the same fingerprint? Type yes: ")
    except EOFError:
        answer = ""
    if answer != "yes":
        raise UmbelError("the site was not added: nothing was changed", file=file)


def _admit(
    settings: ServerConfig, asked: SignedRequest, document: RosterDocument, out: Path, file: Path
) -> None:
    """Issues the certificate, writes the kit, and lets the relay in."""
    request = asked.request
    authority = load_authority(settings)
    certificate = authority.site(request.site, check_request(asked, file), datetime.now(UTC))
    pem = certificate_pem(certificate).decode()
    kit = SiteKit(
        federation=document.roster.federation,
        site=request.site,
        server=settings.listen.public or settings.listen.address,
        server_ca=certificate_pem(authority.certificate).decode(),
        certificate=pem,
        roster=document_to_json(document),
    )
    write_new_text(out, kit_to_json(give(kit, read_identity(Path(settings.identity)))))
    entry = SiteEntry(name=request.site, relay_key=request.relay_key, certificate=pem)
    path = Path(settings.sites)
    save_sites(path, {**load_sites(path), request.site: entry})


@sites.command("list")
def list_command(config: Config = SERVER_TOML) -> None:
    """List the sites with their fingerprints and certificates."""
    settings = load_config(config)
    document, known = load_roster(settings), load_sites(Path(settings.sites))
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for column in ("site", "fingerprint", "certificate"):
        table.add_column(column, no_wrap=True)
    for site, entry in known.items():
        member = document.roster.find(site)
        key = "not in the roster" if member is None else fingerprint(member.public_key)
        table.add_row(site, key, "REVOKED" if entry.revoked else _left(entry.certificate))
    console = Console(highlight=False)
    console.print(table if known else "No site was added yet.", soft_wrap=True)


def _left(pem: str) -> str:
    left = x509.load_pem_x509_certificate(pem.encode()).not_valid_after_utc - datetime.now(UTC)
    if left < timedelta():
        return "EXPIRED"
    return f"{left.days} days" + (" LEFT: renew it" if left < SOON else "")


@sites.command()
def revoke(
    site: Annotated[str, typer.Argument(metavar="NAME", help="The site.")],
    out: Annotated[Path, typer.Option(help="The revocation, to be sent to every site.")],
    config: Config = SERVER_TOML,
) -> None:
    """Turn a site away for good: its relay at once, its key from the next round on."""
    settings = load_config(config)
    document, path = load_roster(settings), Path(settings.sites)
    known, member = load_sites(path), document.roster.find(site)
    if site not in known or member is None:
        raise IdentityError(
            "no site of this name takes part",
            field=site,
            accepted=", ".join(sorted(known)) or "none was added",
        )
    operator = read_identity(Path(settings.identity))
    signed = sign_revocation(document.roster.federation, member.public_key, operator)
    write_new_text(out, revocation_to_json(signed))
    save_sites(path, {**known, site: msgspec.structs.replace(known[site], revoked=True)})
    revocations = (*document.revocations, signed)
    save_roster(settings, msgspec.structs.replace(document, revocations=revocations))
    console = Console(highlight=False)
    print_lines(
        console,
        [("revoked", f"{site} {fingerprint(member.public_key)}"), ("revocation", str(out))],
    )
    console.print(
        f"\nSend {out} to every site: umbel-client roster revoke {out.name}", soft_wrap=True
    )


@sites.command()
def renew(
    request: Annotated[Path, typer.Argument(help="The site's request, the old or a new one.")],
    out: Annotated[Path, typer.Option(help="The kit for the site, which this makes.")],
    config: Config = SERVER_TOML,
) -> None:
    """Give a site a new certificate, for the same or another relay key; its identity stays."""
    settings = load_config(config)
    asked = request_from_json(read_text(request), request)
    check_request(asked, request)
    document, known = load_roster(settings), load_sites(Path(settings.sites))
    site = asked.request.site
    member = document.roster.find(site)
    if member is None or site not in known or member.public_key != asked.request.identity:
        raise IdentityError(
            "no site of this name and identity takes part",
            file=request,
            found=f"{site} {fingerprint(asked.request.identity)}",
            remedy="umbel-server sites list; a new site is added with `sites add`",
        )
    if known[site].revoked or member.public_key in document.revoked():
        raise IdentityError("this site is revoked, for good", file=request, found=site)
    _admit(settings, asked, document, out, request)
    print_lines(Console(highlight=False), [("site", site), ("kit", str(out))])


@roster.command()
def export(out: Out, config: Config = SERVER_TOML) -> None:
    """Write the roster as a file for the sites, who compare and approve it."""
    document = load_roster(load_config(config))
    write_new_text(out, document_to_json(document))
    lines = [("roster", str(out)), ("digest", document.roster.digest().hex())]
    print_lines(Console(highlight=False), lines)


def renew_command(config: Config = SERVER_TOML) -> None:
    """Give the server itself a new certificate; restart it afterwards."""
    certificate = renew_server(load_config(config))
    typer.echo(f"good until {certificate.not_valid_after_utc:%Y-%m-%d}: restart umbel-server run")


def register(app: typer.Typer) -> None:
    """Adds these commands to `umbel-server`."""
    app.command()(init)
    app.add_typer(sites, name="sites")
    app.add_typer(roster, name="roster")
    app.command("renew")(renew_command)
