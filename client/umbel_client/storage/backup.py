"""A site's backup: what it holds, and how it comes back marked as an old copy."""

import re
import sqlite3
from collections.abc import Callable
from pathlib import Path

from umbel_client.ledger.contents import Contents
from umbel_client.ledger.file import SCHEMA as LEDGER_SCHEMA
from umbel_client.ledger.file import read_ledger
from umbel_client.ledger.ledger import Ledger
from umbel_client.site.config import ClientConfig, load_config
from umbel_client.site.state_folder import StateFolder
from umbel_client.storage.journal import Journal, journal_schema
from umbel_client.storage.site_state import copy_site_state
from umbel_common.errors import StorageError
from umbel_host.files.backup import Manifest, read_manifest, require_party, unpack, write_backup
from umbel_host.files.keys import read_identity
from umbel_host.files.restore import (
    Intent,
    config_of,
    put_back,
    require_inside,
    vacant,
    workplace,
)

CONFIG = "client.toml"
KEPT = StateFolder(Path("state"))
"""The state folder as it is called in a backup."""
LEDGER = KEPT.ledger.as_posix()
JOURNAL = KEPT.journal.as_posix()
_FORMER_ROSTER = re.compile(r"rosters/[^/]+-([0-9a-f]{64})[^/]*")
_NAMES = re.compile(
    rf"{CONFIG}|roster\.json|relay/(server-ca|certificate)\.pem|keys/(identity|relay)\.pem"
    rf"|{_FORMER_ROSTER.pattern}|{LEDGER}|{JOURNAL}"
    rf"|({KEPT.decisions.as_posix()}|{KEPT.adapters.as_posix()})/.+"
)
"""What the parts of a backup are named."""


def back_up(config: Path, out: Path, *, keys: bool) -> tuple[Manifest, Contents]:
    """Writes a backup of a site, whose trainer may be running.

    Decisions and received adapters are kept beside the two databases. Deltas, the cache of the
    frozen layers and the adapters of jobs under way are not: no old round may leave again, hidden
    states are private data that can be computed again, and the operator sends an adapter again.

    Args:
        config: client.toml.
        keys: whether the private keys go into it.

    Raises:
        IdentityError: the key that signs the backup cannot be used.
        LedgerError: there is no ledger, or it is damaged or contradicts the journal.
        StorageError: something cannot be read or written; nothing is left of the backup.
    """
    settings = load_config(config)
    signer = read_identity(Path(settings.identity))
    state = settings.state_folder
    with workplace(out.absolute().parent, f"{out.name}.copies") as place:
        copies = StateFolder(place)
        contents = _copy_databases(state, copies)
        sources = {LEDGER: copies.ledger, JOURNAL: copies.journal}
        for folder in (state.decisions, state.adapters):
            for path in sorted(folder.rglob("*")):
                if path.is_file() and not path.is_symlink() and not path.name.startswith("."):
                    sources[(KEPT.root / path.relative_to(state.root)).as_posix()] = path
        sources[CONFIG] = config.absolute()
        places = {**_places(settings), **_key_places(settings)} if keys else _places(settings)
        sources |= {name: path for name, path in places.items() if path.exists()}
        roster = Path(settings.roster)
        for path in roster.parent.glob(f"{roster.stem}-{'[0-9a-f]' * 64}{roster.suffix}"):
            sources[f"rosters/{path.name}"] = path
        manifest = write_backup(
            out, signer, "umbel-client", settings.site, sources, schemas=_schemas(), keys=keys
        )
    return manifest, contents


def restore(backup: Path, config: Path, consent: Callable[[Intent], None]) -> None:
    """Puts a site's backup back, all of it or nothing; its ledger is marked as an old copy.

    Args:
        config: client.toml; where there is no such file, the backup's is put there.
        consent: is asked before anything is written, and raises an error if it does not agree.

    Raises:
        ConfigError: the client.toml that is there is not usable.
        StorageError: the state folder holds something or is in use, the backup is damaged, of
            another site or a later version, or names a place outside its folder, or the disk is
            full. Nothing was changed.
    """
    manifest, signer = read_manifest(backup, "umbel-client", _schemas(), _NAMES)
    with config_of(backup, manifest, CONFIG, config) as path:
        settings = load_config(path)
        if path != config:
            named = {**_places(settings), **_key_places(settings), "state": Path(settings.state)}
            require_inside(config.absolute().parent, named)
    require_party(backup, manifest, settings.site)
    state = settings.state_folder
    roster = Path(settings.roster)
    former = {
        name: roster.with_name(f"{roster.stem}-{found[1]}{roster.suffix}")
        for name in sorted(part.name for part in manifest.parts)
        if (found := _FORMER_ROSTER.fullmatch(name))
    }
    intent = Intent.of(
        manifest,
        signer,
        state=state.root,
        identity=Path(settings.identity),
        places={CONFIG: config.absolute(), **_places(settings), **former},
        keys=_key_places(settings),
    )
    with (
        vacant(state.root, state.lock.name, "this site's trainer"),
        workplace(state.root.parent, f"{state.root.name}.restoring") as place,
    ):
        consent(intent)
        unpack(backup, manifest, place)
        _mark(manifest, place)
        files = {target: place / name for target, name in intent.files.items()}
        put_back(place / KEPT.root, state.root, files)


def _copy_databases(state: StateFolder, copies: StateFolder) -> Contents:
    """Copies ledger and journal, and deletes the secrets of every attempt from the copy."""
    read_ledger(state.ledger)
    try:
        contents = copy_site_state(state, copies)
    except (sqlite3.Error, OSError) as error:
        raise StorageError(
            "a site's databases cannot be copied; no backup was made", file=state.root, found=error
        ) from None
    journal = Journal(copies.journal)
    journal.end_all()
    journal.close()
    return contents


def _mark(manifest: Manifest, place: Path) -> None:
    """Marks an unpacked ledger: what was spent since the backup is not in it."""
    path = place / LEDGER
    if not path.exists() or not (place / JOURNAL).exists():
        raise StorageError(
            "a backup holds no ledger and journal; nothing was changed", found=manifest.made
        )
    contents = read_ledger(path)
    with Ledger.open(path, contents.data_set, contents.unit) as ledger:
        ledger.mark_as_old_copy(manifest.digest())


def _schemas() -> dict[str, int]:
    return {LEDGER: LEDGER_SCHEMA.version, JOURNAL: journal_schema().version}


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
