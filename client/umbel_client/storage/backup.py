"""A site's backup: what it holds, and how it comes back as an old copy that says that it is one."""

import sqlite3
from pathlib import Path

import msgspec

from umbel_client.ledger.file import SCHEMA as LEDGER_SCHEMA
from umbel_client.ledger.file import read_ledger, require_head, require_journal
from umbel_client.ledger.ledger import Ledger
from umbel_client.ledger.rows import Contents
from umbel_client.site.config import ClientConfig, load_config
from umbel_client.storage.journal import Journal, journal_schema, read_published
from umbel_common.errors import StorageError
from umbel_host.files.backup import Manifest, read_manifest, require_party, unpack, write_backup
from umbel_host.files.database import copy_database
from umbel_host.files.restore import config_of, put_back, vacant, workplace

CONFIG = "client.toml"
LEDGER = "state/ledger.sqlite"
SESSION = "state/session.sqlite"
KEPT_FOLDERS = ("decisions", "adapters")
"""Of the state folder, beside the two databases. Deltas and the cache of frozen layers are not
kept: no old round may leave again, and hidden states are private data that can be computed anew."""


class Restored(msgspec.Struct, frozen=True):
    """What a restore did."""

    manifest: Manifest
    state: Path
    written: list[Path]
    kept: list[Path]
    missing: list[Path]
    """Keys that are neither here nor in the backup."""


def back_up(config: Path, out: Path, *, keys: bool) -> tuple[Manifest, Contents]:
    """Writes a backup of a site, whose trainer may be running.

    Args:
        config: client.toml.
        keys: whether the private keys go into it.

    Raises:
        LedgerError: there is no ledger, or it is damaged or contradicts the journal.
        StorageError: something cannot be read or written; nothing is left of the backup.
    """
    settings = load_config(config)
    state = Path(settings.state)
    with workplace(out.absolute().parent, f"{out.name}.copies") as place:
        contents = _copy_databases(state, place)
        sources = {LEDGER: place / "ledger.sqlite", SESSION: place / "session.sqlite"}
        for folder in KEPT_FOLDERS:
            for path in sorted((state / folder).rglob("*")):
                if path.is_file() and not path.name.startswith("."):
                    sources[f"state/{path.relative_to(state).as_posix()}"] = path
        sources[CONFIG] = config.absolute()
        places = {**_places(settings), **_key_places(settings)} if keys else _places(settings)
        sources |= {name: path for name, path in places.items() if path.exists()}
        roster = Path(settings.roster)
        for path in roster.parent.glob(f"{roster.stem}-{'[0-9a-f]' * 64}{roster.suffix}"):
            sources[f"rosters/{path.name}"] = path
        manifest = write_backup(
            out, "umbel-client", settings.site, sources, schemas=_schemas(), keys=keys
        )
    return manifest, contents


def restore(backup: Path, config: Path) -> Restored:
    """Puts a site's backup back, all of it or nothing; its ledger is marked as an old copy.

    Args:
        config: client.toml; where there is none, the backup's is put there.

    Raises:
        ConfigError: the client.toml that is there is not usable.
        StorageError: the state folder holds something or is in use, the backup is damaged, of
            another site or a later version, or the disk is full. Nothing was changed.
    """
    manifest = read_manifest(backup, "umbel-client", _schemas())
    with config_of(backup, manifest, CONFIG, config) as path:
        settings = load_config(path)
    require_party(backup, manifest, settings.site)
    state = Path(settings.state)
    with (
        vacant(state, "trainer.lock", "this site's trainer"),
        workplace(state.parent, f"{state.name}.restoring") as place,
    ):
        unpack(backup, manifest, place)
        _mark(manifest, place)
        files = {config.absolute(): place / CONFIG}
        for name, target in {**_places(settings), **_key_places(settings)}.items():
            if (place / name).exists():
                files[target] = place / name
        for former in sorted((place / "rosters").glob("*")):
            files[Path(settings.roster).with_name(former.name)] = former
        written, kept = put_back(place / "state", state, files)
    missing = [path for path in _key_places(settings).values() if not path.exists()]
    return Restored(manifest, state, written, kept, missing)


def _copy_databases(state: Path, place: Path) -> Contents:
    """Copies of journal and ledger that do not contradict, while a trainer may be writing both."""
    ledger, session = state / "ledger.sqlite", state / "session.sqlite"
    read_ledger(ledger)
    try:
        while True:
            for path in place.iterdir():
                path.unlink()
            copy_database(session, place / session.name)
            copy_database(ledger, place / ledger.name)
            # The two are of one moment if the journal stood still.
            published = read_published(place / session.name)
            if read_published(session) == published:
                break
    except (sqlite3.Error, OSError) as error:
        raise StorageError(
            "a site's databases cannot be copied; no backup was made", file=state, found=error
        ) from None
    contents = read_ledger(place / ledger.name)
    # A backup of a state that contradicts itself would bring back what nobody can use.
    if published.ledger_head is not None:
        require_head(ledger, contents, published.ledger_head)
    require_journal(ledger, contents, published.answers)
    journal = Journal(place / session.name)
    journal.end_all()
    journal.close()
    return contents


def _mark(manifest: Manifest, place: Path) -> None:
    """Marks an unpacked ledger: what was spent since the backup is not in it."""
    path = place / LEDGER
    if not path.exists() or not (place / SESSION).exists():
        raise StorageError(
            "a backup holds no ledger and journal; nothing was changed", found=manifest.made
        )
    contents = read_ledger(path)
    with Ledger.open(path, contents.data_set, contents.unit) as ledger:
        ledger.mark_as_old_copy(manifest.digest())


def _schemas() -> dict[str, int]:
    return {LEDGER: LEDGER_SCHEMA.version, SESSION: journal_schema().version}


def _places(settings: ClientConfig) -> dict[str, Path]:
    """Where files beside the state folder belong, by the names of their parts."""
    places = {"roster.json": Path(settings.roster)}
    if settings.relay is not None:
        places["relay/server-ca.pem"] = Path(settings.relay.server_ca)
        places["relay/certificate.pem"] = Path(settings.relay.certificate)
    return places


def _key_places(settings: ClientConfig) -> dict[str, Path]:
    places = {"keys/identity.pem": Path(settings.identity)}
    if settings.relay is not None:
        places["keys/relay.pem"] = Path(settings.relay.key)
    return places
