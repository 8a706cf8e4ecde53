"""`umbel-client init` and `join`: a site's keys, its request to the operator, and the answer."""

import os
from pathlib import Path
from typing import Annotated

import typer
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from rich.console import Console

from umbel_client.config import ClientConfig, load_config, require_relay
from umbel_client.pinned_roster import find_document
from umbel_common.enrolment import (
    SignedKit,
    ask,
    check_kit,
    kit_from_json,
    request_to_json,
)
from umbel_common.errors import IdentityError, StorageError
from umbel_common.identity import Identity, fingerprint
from umbel_common.roster_file import document_from_json
from umbel_host.console import print_lines
from umbel_host.durable import create, replace
from umbel_host.keys import read_identity, write_identity
from umbel_host.options import name, site_name
from umbel_host.text_file import read_text, write_new_text

Config = Annotated[Path, typer.Option(help="This site's client.toml.")]
CLIENT_TOML = Path("client.toml")

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
    paths = {file: folder / file for file in ("identity.pem", "relay/key.pem", "client.toml")}
    out = folder / f"{site}.request.json"
    for path in (paths["relay/key.pem"], out):
        if path.exists():
            raise StorageError(
                "a site is set up once, and nothing is written over",
                file=path,
                remedy="give another --folder, or move the file away",
            )
    identity = _identity(paths["identity.pem"])
    key = ec.generate_private_key(ec.SECP384R1())
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    text = request_to_json(ask(federation, site, identity, key, public.decode()))
    try:
        paths["relay/key.pem"].parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        create(paths["relay/key.pem"], pem, mode=0o600)
        if not paths["client.toml"].exists():
            made = TEMPLATE.format(site=site, server="server.invalid:9443")
            create(paths["client.toml"], made.encode())
    except OSError as error:
        raise StorageError(
            "this site's files cannot be written", file=folder, found=error.strerror
        ) from None
    write_new_text(out, text)
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


def _identity(path: Path) -> Identity:
    """The identity that is there, or a new one."""
    if path.exists():
        return read_identity(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    identity = Identity.generate(os.urandom)
    write_identity(path, identity)
    return identity


def join(
    kit: Annotated[Path, typer.Argument(help="What the operator sent.")],
    config: Config = CLIENT_TOML,
) -> None:
    """Take the certificate of a kit; whom to believe stays your own decision."""
    settings = load_config(config)
    relay = require_relay(settings, config)
    signed = kit_from_json(read_text(kit), kit)
    operator = _check(signed, settings, kit)
    proposal = config.parent / f"{kit.stem}.roster.json"
    try:
        Path(relay.certificate).parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        replace(Path(relay.server_ca), signed.kit.server_ca.encode())
        replace(Path(relay.certificate), signed.kit.certificate.encode())
        replace(proposal, signed.kit.roster.encode())
        if relay.server != signed.kit.server:
            _point(config, relay.server, signed.kit.server)
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


def _check(signed: SignedKit, settings: ClientConfig, file: Path) -> bytes:
    """The operator's public key, of a kit that is for this site."""
    kit = signed.kit
    pinned = find_document(Path(settings.roster))
    document = document_from_json(kit.roster, file) if pinned is None else pinned
    check_kit(signed, document.roster.operator, file)
    if (kit.site, kit.federation) != (settings.site, document.roster.federation):
        raise IdentityError(
            "a kit is for another site",
            file=file,
            found=f"{kit.site} of {kit.federation}",
            accepted=f"{settings.site} of {document.roster.federation}",
        )
    relay = require_relay(settings, file)
    try:
        key = load_pem_private_key(Path(relay.key).read_bytes(), password=None)
        certificate = x509.load_pem_x509_certificate(kit.certificate.encode())
    except (OSError, ValueError, TypeError) as error:
        raise IdentityError(
            "the relay's key or the kit's certificate cannot be used", file=file, found=error
        ) from None
    if certificate.public_key() != key.public_key():
        raise IdentityError(
            "a kit's certificate is for another relay key than this site's",
            file=file,
            field="certificate",
            accepted=relay.key,
            remedy="send the operator the request that was made with this key",
        )
    return document.roster.operator


def _point(config: Path, old: str, new: str) -> None:
    """Only the one value changes: the file is its owner's, comments and all."""
    text = config.read_text(encoding="utf-8")
    line = f'server = "{old}"'
    if text.count(line) != 1:
        raise IdentityError(
            "the server's address cannot be put into the configuration",
            file=config,
            field="relay.server",
            found=old,
            accepted=new,
            remedy="change it by hand, then give the command again",
        )
    replace(config, text.replace(line, f'server = "{new}"').encode())


def register(app: typer.Typer) -> None:
    """Adds these commands to `umbel-client`."""
    app.command()(init)
    app.command()(join)
