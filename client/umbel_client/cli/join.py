"""`umbel-client init` and `join`: a site's keys, its request to the operator, and the answer."""

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from rich.console import Console

from umbel_client.cli.options import CLIENT_TOML, Config
from umbel_client.site.config import ClientConfig, RelayConfig, load_config, require_relay
from umbel_client.site.kit_certificate import Certificates, check_certificate
from umbel_client.site.pinned_roster import find_document
from umbel_common.errors import ConfigError, IdentityError, StorageError
from umbel_common.trust.enrolment import (
    SignedKit,
    check_kit,
    kit_from_json,
    request_from_json,
    request_to_json,
    sign_request,
)
from umbel_common.trust.identity import Identity, fingerprint
from umbel_common.trust.roster_file import document_from_json
from umbel_host.files.durable import all_or_nothing, create, make_folder, replace
from umbel_host.files.keys import read_identity, read_tls_key, write_identity
from umbel_host.files.text_file import find_text, read_text, write_new_text
from umbel_host.terminal import name, print_lines, site_name

TEMPLATE = """\
# This site's configuration: `umbel-client run` reads it. Relative paths start here.
site = "{site}"
# Journal, ledger and deltas: as private as the data itself.
state = "state"
identity = "identity.pem"
# Whom this site believes: only `umbel-client roster` changes it.
roster = "roster.json"

[data]
# .jsonl, .csv or .parquet, with a column `text` and a column `label`.
path = "data.jsonl"
# About how many records (or patients, with unit_column) there are, as everybody may know.
public_size = 1000
# unit_column = "patient"

[model]
# Folder of the base model, which every site gets by itself.
path = "model"

[relay]
# Where the server is; `umbel-client join` fills it in.
server = "{server}"
server_ca = "relay/server-ca.pem"
certificate = "relay/certificate.pem"
key = "relay/key.pem"
socket = "run/trainer.sock"

[policy]
# Nothing runs until these say so: digests of base models, and the labels of a classification.
models = []
labels = []
# A person here approves each plan: umbel-client approve.
approval = "each-plan"
max_epsilon = 3.0
total_epsilon = 3.0
"""


def init(
    site: Annotated[str, typer.Option(callback=site_name, help="This site's name.")],
    federation: Annotated[str, typer.Option(callback=name, help="Name of the federation.")],
    folder: Annotated[Path, typer.Option(help="This site's folder.")] = Path(),
) -> None:
    """Make this site's keys, and the request that the operator needs."""
    identity_file, key_file = folder / "identity.pem", folder / "relay" / "key.pem"
    config, out = folder / "client.toml", folder / f"{site}.request.json"
    for path in (key_file, out):
        if path.exists():
            raise StorageError(
                "a site is set up once, and nothing is written over",
                file=path,
                remedy="give another --folder; for a new relay key, move both the old one and the"
                " old request away",
            )
    with all_or_nothing() as made:
        try:
            made += make_folder(folder, 0o750)
            made += make_folder(key_file.parent, 0o750)
            identity = _identity(identity_file, made)
            key = ec.generate_private_key(ec.SECP384R1())
            pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            create(key_file, pem, mode=0o600)
            made.append(key_file)
            if not config.exists():
                create(config, TEMPLATE.format(site=site, server="server.invalid:9443").encode())
                made.append(config)
        except OSError as error:
            raise StorageError(
                "this site's files cannot be written", file=folder, found=error.strerror
            ) from None
        write_new_text(out, request_to_json(sign_request(federation, site, identity, key)))
    console = Console(highlight=False)
    print_lines(
        console,
        [
            ("site", f"{site} of {federation}"),
            ("fingerprint", fingerprint(identity.public_key)),
            ("request", str(out)),
        ],
    )
    console.print(
        f"\nSend {out.name} to the operator, and read the fingerprint out to them.\n"
        "The private keys stay here: identity.pem for the trainer, relay/key.pem for the relay.",
        soft_wrap=True,
    )


def _identity(path: Path, made: list[Path]) -> Identity:
    """The identity that is there, or a new one, which `made` is told of."""
    if path.exists():
        return read_identity(path)
    identity = Identity.generate(os.urandom)
    write_identity(path, identity)
    made.append(path)
    return identity


def join(
    kit: Annotated[Path, typer.Argument(help="What the operator sent.")],
    config: Config = CLIENT_TOML,
) -> None:
    """Take the certificate of a kit; whom to believe stays your own decision."""
    settings = load_config(config)
    relay = require_relay(settings, config)
    signed = kit_from_json(read_text(kit), kit)
    operator = _check(signed, settings, config, kit)
    certificates = _certificates(signed, relay, kit)
    proposal = _proposal(settings, relay, config, kit)
    pointed = _pointed(config, relay.server, signed.kit.server)
    try:
        for path, data in (
            (proposal, signed.kit.roster.encode()),
            (Path(relay.server_ca), certificates.server_ca),
            (Path(relay.certificate), certificates.relay),
        ):
            make_folder(path.parent, 0o750)
            replace(path, data)
        if pointed is not None:
            replace(config, pointed.encode())
    except OSError as error:
        raise StorageError(
            "the files of a kit cannot be written", file=config.parent, found=error.strerror
        ) from None
    console = Console(highlight=False)
    print_lines(
        console,
        [
            ("server", signed.kit.server),
            ("certificate", relay.certificate),
            ("operator", fingerprint(operator)),
            ("roster", f"{proposal}, which nobody here approved yet"),
        ],
    )
    console.print(
        "\nCompare the operator's fingerprint with what the operator reads out to you, and each\n"
        f"site's with that site. Then: umbel-client roster approve {proposal.name}",
        soft_wrap=True,
    )


def _check(signed: SignedKit, settings: ClientConfig, config: Path, file: Path) -> bytes:
    """The operator's public key, of a kit that is for this site."""
    kit = signed.kit
    pinned = find_document(Path(settings.roster))
    proposed = document_from_json(kit.roster, file)
    document = proposed if pinned is None else pinned
    check_kit(signed, document.roster.operator, file)
    if document.roster.operator in document.revoked():
        raise IdentityError(
            "a kit is signed by a key of the operator that is revoked",
            file=file,
            found=fingerprint(document.roster.operator),
            remedy="approve a roster with the operator's new key first",
        )
    federation = document.roster.federation if pinned else _asked(settings, config, kit.federation)
    if (kit.site, kit.federation) != (settings.site, federation):
        raise IdentityError(
            "a kit is for another site",
            file=file,
            found=f"{kit.site} of {kit.federation}",
            accepted=f"{settings.site} of {federation}",
            remedy="take the kit that the operator made for this site",
        )
    if proposed.roster.federation != kit.federation:
        raise IdentityError(
            "a kit's roster is of another federation",
            file=file,
            field="roster",
            found=proposed.roster.federation,
            accepted=kit.federation,
            remedy="ask the operator for a new kit",
        )
    return document.roster.operator


def _asked(settings: ClientConfig, config: Path, otherwise: str) -> str:
    """The federation that this site asked, if its request is still where `init` put it."""
    path = config.parent / f"{settings.site}.request.json"
    text = find_text(path)
    return otherwise if text is None else request_from_json(text, path).request.federation


def _certificates(signed: SignedKit, relay: RelayConfig, file: Path) -> Certificates:
    key = read_tls_key(Path(relay.key)).public_key()
    return check_certificate(signed.kit, key, datetime.now(UTC), file)


def _proposal(settings: ClientConfig, relay: RelayConfig, config: Path, kit: Path) -> Path:
    """Where the kit's roster is put for this site's people to look at. The sender names the kit:
    no name may lead to a file of this site, such as the pinned roster."""
    path = config.absolute().parent / f"{kit.stem}.roster.json"
    own = (
        settings.roster,
        settings.identity,
        settings.data.path,
        relay.server_ca,
        relay.certificate,
        relay.key,
    )
    if path.resolve() in {Path(file).resolve() for file in (config, kit, *own)}:
        raise StorageError(
            "a kit's roster would be written over a file of this site",
            file=path,
            remedy="give the kit another file name",
        )
    return path


def _pointed(config: Path, old: str, new: str) -> str | None:
    """The configuration with the server's address in it, if it has to change. Only the one value
    does: the file is its owner's, comments and all."""
    if old == new:
        return None
    text = config.read_text(encoding="utf-8")
    line = f'server = "{old}"'
    if text.count(line) != 1:
        raise ConfigError(
            "the server's address cannot be put into the configuration",
            file=config,
            field="relay.server",
            found=old,
            accepted=new,
            remedy="change it by hand, then give the command again",
        )
    return text.replace(line, f'server = "{new}"')


def register(app: typer.Typer) -> None:
    """Adds these commands to `umbel-client`."""
    app.command()(init)
    app.command()(join)
