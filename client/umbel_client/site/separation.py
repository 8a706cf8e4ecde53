"""Whether trainer and relay are kept apart, as each of them finds it when it starts.

Both ask about files: a process that can read what is the other's has the other's user, or is root,
or the modes are wrong. In a container each sees its own files only, whatever its user's number.
"""

import logging
import os
from pathlib import Path

from umbel_client.site.config import ClientConfig, RelayConfig
from umbel_common.errors import ConfigError
from umbel_host.processes.lifecycle import this_user


def trainer_not_apart(relay: RelayConfig) -> str | None:
    """Why the trainer, this process, is not kept apart from its relay; None if it is."""
    return _not_apart("trainer", (Path(relay.key),))


def relay_not_apart(config: ClientConfig) -> str | None:
    """Why the relay, this process, is not kept apart from what is the trainer's; None if it is."""
    state = config.state_folder
    return _not_apart(
        "relay", (Path(config.identity), Path(config.data.path), state.ledger, state.root)
    )


def judge_separation(config: ClientConfig, file: Path, found: str | None, log: str) -> None:
    """Warns of what `trainer_not_apart` or `relay_not_apart` found.

    Args:
        file: client.toml, for the error.
        log: name of the logger.

    Raises:
        ConfigError: the site requires isolation.
    """
    if found is None:
        return
    if config.isolation == "required":
        raise ConfigError(
            "trainer and relay are not kept apart",
            file=file,
            field="isolation",
            found=found,
            accepted="a user of its own for each, neither of them root; or a container for each",
            remedy="see docs/deploy/systemd.md, or docs/deploy/containers.md",
        )
    logging.getLogger(log).warning(
        "TRAINER AND RELAY ARE NOT KEPT APART: %s. Run each as a user of its own, as"
        " docs/deploy/systemd.md does",
        found,
    )


def _not_apart(process: str, others: tuple[Path, ...]) -> str | None:
    if os.geteuid() == 0:
        return f"the {process} runs as root"
    readable = [str(path) for path in others if _has_content(path)]
    if readable:
        return f"the {process}'s user, {this_user()}, can read {', '.join(readable)}"
    return None


def _has_content(path: Path) -> bool:
    """Whether this process can read a file, or a folder that is not empty."""
    if not os.access(path, os.R_OK):
        return False
    return not path.is_dir() or any(os.scandir(path))
