"""The operator's backup: what it contains, and how it is restored."""

import re
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from umbel_common.errors import StorageError
from umbel_common.trust.identity import fingerprint
from umbel_host.files.backup import Manifest, read_manifest, require_party, unpack, write_backup
from umbel_host.files.database import copy_database
from umbel_host.files.keys import read_identity
from umbel_host.files.restore import (
    Intent,
    config_of,
    put_back,
    require_inside,
    vacant,
    workplace,
)
from umbel_server.operator.config import ServerConfig, load_config, load_roster
from umbel_server.storage.job_queue import QUEUE_SCHEMA, JobQueue
from umbel_server.storage.journal import JOURNAL_SCHEMA, Journal

CONFIG = "server.toml"
DATABASES = {
    "state/journal.sqlite": JOURNAL_SCHEMA,
    "state/queue.sqlite": QUEUE_SCHEMA,
}
"""Databases in a backup. The SuperLink's is not among them: it is emptied at each start."""
_SCHEMAS = {name: schema.version for name, schema in DATABASES.items()}


_NAMES = re.compile(
    rf"{CONFIG}|(roster|sites)\.json|(tls|ca)/certificate\.pem|keys/(identity|tls|ca)\.pem"
    rf"|{'|'.join(DATABASES)}|state/registry/[^/]+/[^/]+"
)
"""What the parts of a backup are named."""


def back_up(config: Path, out: Path, *, keys: bool) -> Manifest:
    """Writes a backup of an operator, whose server may be running.

    Args:
        config: server.toml.
        keys: whether it contains the private keys.

    Raises:
        IdentityError: the key that signs the backup cannot be used.
        StorageError: a file cannot be read or written; nothing is left of the backup.
    """
    settings = load_config(config)
    signer = read_identity(Path(settings.identity))
    state = Path(settings.state)
    party = fingerprint(load_roster(settings).roster.operator)
    with workplace(out.absolute().parent, f"{out.name}.copies") as place:
        sources: dict[str, Path] = {}
        for name in DATABASES:
            path = state / Path(name).name
            try:
                if path.exists():
                    copy_database(path, place / path.name)
            except sqlite3.Error as error:
                raise StorageError(
                    "a database cannot be copied; no backup was made", file=path, found=error
                ) from None
            sources[name] = place / path.name
        # Brings both to today's schema, and creates them if the operator never had a job.
        Journal(place / "journal.sqlite").close()
        JobQueue(place / "queue.sqlite").close()
        # Copied after the journal, which names nothing that is not in the registry before it.
        for path in sorted((state / "registry").glob("*/*")):
            partial = ".partial-" in path.parent.name or ".partial-" in path.name
            if not partial and not path.is_symlink():
                sources[f"state/registry/{path.parent.name}/{path.name}"] = path
        sources[CONFIG] = config.absolute()
        places = {**_places(settings), **_key_places(settings)} if keys else _places(settings)
        sources |= {name: path for name, path in places.items() if path.exists()}
        return write_backup(
            out, signer, "umbel-server", party, sources, schemas=_SCHEMAS, keys=keys
        )


def restore_backup(
    backup: Path, config: Path, consent: Callable[[Intent], None]
) -> tuple[str, ...]:
    """Restores an operator's backup, all of it or nothing; stops the jobs that were not over.

    The backup does not contain what was released since. The sites know it, and accept no second
    release of a round: a person has to decide which jobs to resume.

    Args:
        config: server.toml; if it does not exist, the backup's is put there.
        consent: is asked before anything is written, and raises an error if it does not agree.

    Returns:
        the jobs that were waiting or running, and are stopped now.

    Raises:
        ConfigError: the existing server.toml cannot be used.
        StorageError: the state folder is not empty or is in use; the backup is damaged, of another
            operator or of a later version, or names a place outside its folder; or the disk is
            full. Nothing was changed.
    """
    manifest, signer = read_manifest(backup, "umbel-server", _SCHEMAS, _NAMES)
    with config_of(backup, manifest, CONFIG, config) as path:
        settings = load_config(path)
        if path != config:
            named = {**_places(settings), **_key_places(settings), "state": Path(settings.state)}
            require_inside(config.absolute().parent, named)
    if Path(settings.roster).exists():
        require_party(backup, manifest, fingerprint(load_roster(settings).roster.operator))
    state = Path(settings.state)
    intent = Intent.of(
        manifest,
        signer,
        state=state,
        identity=Path(settings.identity),
        places={CONFIG: config.absolute(), **_places(settings)},
        keys=_key_places(settings),
    )
    with (
        vacant(state, "rounds.lock", "the process with the jobs"),
        workplace(state.parent, f"{state.name}.restoring") as place,
    ):
        consent(intent)
        unpack(backup, manifest, place)
        with closing(JobQueue(place / "state" / "queue.sqlite")) as queue:
            stopped = queue.stop_all(f"restored from the backup of {manifest.made}")
        Journal(place / "state" / "journal.sqlite").close()
        files = {target: place / name for target, name in intent.files.items()}
        put_back(place / "state", state, files)
    return stopped


def _places(settings: ServerConfig) -> dict[str, Path]:
    """Returns the name in the backup -> path, for the files outside the state folder."""
    return {
        "roster.json": Path(settings.roster),
        "sites.json": Path(settings.sites),
        "tls/certificate.pem": Path(settings.listen.certificate),
        "ca/certificate.pem": Path(settings.listen.client_ca),
    }


def _key_places(settings: ServerConfig) -> dict[str, Path]:
    return {
        "keys/identity.pem": Path(settings.identity),
        "keys/tls.pem": Path(settings.listen.key),
        "keys/ca.pem": Path(settings.listen.client_ca).with_name("key.pem"),
    }
