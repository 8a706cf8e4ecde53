"""How a site joins a federation: its keys, its request to the operator, and the kit in return."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import tomlkit
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from umbel_client.site.config import ClientConfig, RelayConfig, load_config, require_relay
from umbel_client.site.kit_certificate import Certificates, check_certificate
from umbel_client.site.pinned_roster import find_document
from umbel_common.address import require_reachable
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
from umbel_host.files.model_digest import folder_digest
from umbel_host.files.text_file import find_text, read_text, write_new_text

TEMPLATE = """\
# This site's configuration: `umbel-client run` reads it. Relative paths start here.
site = "{site}"
# Journal, ledger and deltas: as private as the data itself.
state = "state"
identity = "identity.pem"
# Whom this site believes: only `umbel-client roster` changes it.
roster = "roster.json"

[data]
# What you call the data set, the same for all its versions and federations: it has one ledger.
name = "{site}"
# .jsonl, .csv or .parquet, with a column `text` and a column `label`.
path = {data}
# About how many records (or patients, with unit_column) there are, as everybody may know.
public_size = {public_size}
# unit_column = "patient"

[model]
# Folder of the base model, which every site gets by itself.
path = {model}

[relay]
# Where the server is; `umbel-client join` fills it in.
server = "{server}"
server_ca = "relay/server-ca.pem"
certificate = "relay/certificate.pem"
key = "relay/key.pem"
socket = "run/trainer.sock"

[policy]
# Nothing runs until these say so: digests of base models, and the labels of a classification.
models = {models}
labels = {labels}
# A person here approves each plan: umbel-client approve.
approval = "each-plan"
# The most for one job, and for all jobs on this data set together: what is spent stays spent.
max_epsilon = 3.0
total_epsilon = 3.0
"""


ALONE = """\
# For work on this machine alone: train, evaluate, classify, generate, export, data. Relative paths
# start here. docs/fields.md explains every field.

[data]
# .jsonl, .csv or .parquet, with a column `text` and a column `label`.
path = "data.jsonl"
# About how many records (or patients, with unit_column) there are; noise follows from it.
public_size = 1000

[model]
# Folder of the base model (docs/base-model.md).
path = "model"
"""


def set_up_alone(folder: Path) -> Path:
    """Makes a configuration for work without a federation; returns its file.

    Raises:
        StorageError: there is one already, or it cannot be written.
    """
    config = folder / "client.toml"
    with all_or_nothing() as made:
        try:
            made += make_folder(folder, 0o750)
        except OSError as error:
            raise StorageError(
                "this folder cannot be made", file=folder, found=error.strerror
            ) from None
        write_new_text(config, ALONE)
    return config


@dataclass(frozen=True)
class Own:
    """What a new configuration says of a site's own data and model; None: it is for people to fill
    in."""

    data: Path | None = None
    """The file with the records."""
    public_size: int | None = None
    """About how many there are."""
    model: Path | None = None
    """Folder of the base model, which the policy then allows."""
    labels: Sequence[str] = ()
    """The labels that the policy allows."""

    def fields(self, folder: Path) -> dict[str, str]:
        """The values as TOML, for a configuration in this folder.

        Raises:
            ConfigError: the file with the records is missing, or a name is not UTF-8.
            ModelError: the folder is no base model.
        """
        if self.data is not None and not self.data.exists():
            raise ConfigError(
                "a file with records is missing",
                file=self.data,
                field="--data",
                remedy="give the path of the file",
            )
        models = [] if self.model is None else [folder_digest(self.model).hex()]
        values = {
            "data": _path_in(folder, self.data or folder / "data.jsonl"),
            "public_size": self.public_size or 1000,
            "model": _path_in(folder, self.model or folder / "model"),
            "models": models,
            "labels": list(self.labels),
        }
        fields = {name: tomlkit.item(value).as_string() for name, value in values.items()}
        for name, text in fields.items():
            try:
                text.encode()
            except UnicodeEncodeError:
                raise ConfigError(
                    "a configuration cannot hold this name",
                    field=name,
                    found=ascii(values[name]),
                    accepted="names and paths in UTF-8",
                ) from None
        return fields


def _path_in(folder: Path, path: Path) -> str:
    """A path for a configuration in a folder: relative where it leads into this folder."""
    whole, root = path.absolute(), folder.absolute()
    return str(whole.relative_to(root) if whole.is_relative_to(root) else whole)


def set_up(
    folder: Path, site: str, federation: str, own: Own | None = None
) -> tuple[Identity, Path]:
    """Makes a site's keys, configuration and request; returns its identity and the request's file.

    An identity and a configuration that are there already are kept.

    Args:
        own: what the configuration says, which must be a new one; None: keep one that is there.

    Raises:
        StorageError: the site was set up before, or a file cannot be written; nothing is left.
        IdentityError: the identity that is there cannot be used.
        ConfigError, ModelError: see `Own.fields`.
    """
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
    if own is not None and config.exists():
        raise StorageError(
            "a configuration is there already, and nothing is written over",
            file=config,
            remedy="leave out --data, --public-size, --model and --label; change the file by hand",
        )
    fields = (own or Own()).fields(folder)
    text = TEMPLATE.format(site=site, server="server.invalid:9443", **fields)
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
                create(config, text.encode())
                made.append(config)
        except OSError as error:
            raise StorageError(
                "this site's files cannot be written", file=folder, found=error.strerror
            ) from None
        write_new_text(out, request_to_json(sign_request(federation, site, identity, key)))
    return identity, out


@dataclass(frozen=True)
class Joined:
    """What a kit gave this site."""

    server: str
    """Host and port."""
    certificate: Path
    """The relay's certificate."""
    operator: bytes
    """Public key of the operator, 32 bytes."""
    proposal: Path
    """The kit's roster, which nobody here has approved yet."""
    sites: tuple[str, ...]
    """The sites in it."""
    is_pinned: bool
    """Whether it is the roster that this site has pinned."""


def take_kit(config: Path, file: Path) -> Joined:
    """Takes certificate, address and proposed roster out of an enrolment kit.

    Args:
        config: client.toml, whose server address is replaced.
        file: the kit.

    Raises:
        ConfigError: the configuration cannot be used, or its address not replaced.
        SignatureError, IdentityError: the kit is not from the operator, or not for this site.
        StorageError: a file of this site would be overwritten, or cannot be written.
    """
    settings = load_config(config)
    relay = require_relay(settings, config)
    signed = kit_from_json(read_text(file), file)
    operator = _check(signed, settings, config, file)
    certificates = _certificates(signed, relay, file)
    proposal = _proposal(settings, relay, config, file)
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
    roster = document_from_json(signed.kit.roster, file).roster
    pinned = find_document(Path(settings.roster))
    return Joined(
        signed.kit.server,
        Path(relay.certificate),
        operator,
        proposal,
        sites=tuple(member.name for member in roster.members),
        is_pinned=pinned is not None and pinned.roster == roster,
    )


def _identity(path: Path, made: list[Path]) -> Identity:
    """The identity that is there, or a new one, whose file is added to `made`."""
    if path.exists():
        return read_identity(path)
    identity = Identity.generate(os.urandom)
    write_identity(path, identity)
    made.append(path)
    return identity


def _check(signed: SignedKit, settings: ClientConfig, config: Path, file: Path) -> bytes:
    """The operator's public key, after checking that the kit is for this site."""
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
    try:
        require_reachable(kit.server)
    except ValueError as error:
        raise IdentityError(
            f"a site could not connect to the address in a kit: {error}",
            file=file,
            field="server",
            found=kit.server,
            remedy="ask the operator for a new kit",
        ) from None
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
    """The file for the kit's roster, which this site's people look at. Its name follows from the
    kit's, which the sender chose: it must not be that of a file of this site, such as the pinned
    roster."""
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
    """The configuration with the server's address, or None if it is there already. Only this value
    changes: the rest of the file, with its comments, is its owner's."""
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
