"""The trainer behind its two sockets: one for the relay, one for the site's own people.

This module is part of the core of the privacy guarantee. Never let the relay's socket carry
anything but a sealed request and its sealed reply, and never let the relay's user reach the other
socket.
"""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from umbel_client.data.site_data import SiteData
from umbel_client.ledger.file import read_ledger, require_data_set
from umbel_client.ledger.register import machine_register, marks_of
from umbel_client.site.config import (
    ClientConfig,
    load_config,
    require_relay,
    trainer_socket,
)
from umbel_client.site.decisions import Decisions
from umbel_client.site.ipc import (
    CONTROL,
    TRAINER,
    TrainerStatus,
    handle_method,
    largest_method,
    status_method,
    watch_method,
)
from umbel_client.site.pinned_roster import Pinned, load_pinned
from umbel_client.site.separation import judge_separation, trainer_not_apart
from umbel_client.trainer.isolation import Network, network
from umbel_client.trainer.log import SiteLog
from umbel_common.errors import ConfigError
from umbel_host.files.keys import read_identity
from umbel_host.files.model_digest import require_model
from umbel_host.processes.lifecycle import locked, require_state, stop_on_signals, wait_for
from umbel_host.transport.sockets import SocketServer

if TYPE_CHECKING:
    from umbel_client.trainer.handler import Trainer

RELAY_MODE = 0o660
"""Mode of the relay's socket: the relay runs as another user of the same group."""
CONTROL_MODE = 0o600
_STOPPING_SECONDS = 30.0
_NAME = "umbel.trainer"


def run(path: Path, no_isolation: str | None) -> None:
    """Serves until told to stop. Training under way is then abandoned: its round is charged, and
    computed again after the next start.

    Args:
        path: client.toml.
        no_isolation: why the process still has a way out; None if it has none.

    Raises:
        UmbelError: the configuration, the roster, the key, data, model, the journal or a socket
            cannot be used; or the data set has its ledger in another state folder.
    """
    config = load_config(path)
    relay = require_relay(config, path)
    logger = logging.getLogger(_NAME)
    if no_isolation is not None:
        _judge_isolation(config, path, no_isolation, logger)
    not_apart = trainer_not_apart(relay)
    judge_separation(config, path, not_apart, logger.name)
    state = config.state_folder
    require_state(state.root)
    log = SiteLog(logger)
    stopping = stop_on_signals()
    with ExitStack() as stack:
        stack.enter_context(locked(state.lock, "this site's trainer"))
        pinned = load_pinned(config)
        isolated = no_isolation is None and network() is Network.NONE
        service = _Service(config, pinned, log, isolated, not_apart)
        # From now on its people see that it starts, which can take long.
        control = service.control()
        control.start()
        stack.callback(control.stop, _STOPPING_SECONDS)
        require_model(Path(config.model.path))
        data = _read_data(config)
        identity = read_identity(Path(config.identity))
        # Imported only now: errors so far are reported at once, and not after the seconds it takes.
        import torch

        from umbel_client.models.base.device import (
            chosen_devices,
            described,
            memory_in_use,
            require_alike,
        )
        from umbel_client.trainer.handler import Trainer

        torch.set_num_threads(config.threads)
        devices = chosen_devices(config.model.device)
        name = described(*devices)
        if config.model.split == "records":
            require_alike(devices)
            name += ", each with a copy of the model"
        trainer = Trainer(config, pinned, identity, observer=log, data=data)
        stack.callback(trainer.close)
        service.device, service.memory = name, partial(memory_in_use, *devices)
        relayed = service.relayed(trainer, trainer_socket(relay))
        relayed.start()
        stack.callback(relayed.stop, _STOPPING_SECONDS)
        for server in (relayed, control):
            server.report_health(True)
        log.note(f"the trainer of {config.site} waits at {trainer_socket(relay)}")
        chosen = config.model.device
        shown = chosen if isinstance(chosen, str) else ", ".join(chosen)
        log.note(f"it computes on {name} (model.device = {shown})")
        wait_for(stopping)
        log.note("the trainer stops")
        log.stop()


def _read_data(config: ClientConfig) -> SiteData:
    """Reads the site's records, if the ledger that they belong to is the one here.

    Raises:
        DataError: no task can use the file.
        LedgerError: the data set has its ledger elsewhere, or the ledger here is about other data:
            the file has changed.
        StorageError: the ledger or the register cannot be read.
    """
    data, path = SiteData.load(config), config.state_folder.ledger
    data.require()
    if data.source is not None and data.data_set is not None:
        machine_register().require_free(path, marks_of(config, data.source))
        if path.exists():
            require_data_set(path, read_ledger(path), data.data_set, config.data.unit_column)
    return data


def _judge_isolation(
    config: ClientConfig, path: Path, refused: str, logger: logging.Logger
) -> None:
    if config.isolation == "required":
        raise ConfigError(
            "the trainer cannot close every way out, and must not run with one open",
            file=path,
            field="isolation",
            found=refused,
            accepted="seccomp, on x86-64 or ARM64",
        )
    logger.warning(
        "THE TRAINER HAS A WAY OUT: %s. Run it on x86-64 or ARM64, where the kernel allows seccomp",
        refused,
    )


class _Service:
    """Answers the calls on both sockets."""

    def __init__(
        self,
        config: ClientConfig,
        pinned: Pinned,
        log: SiteLog,
        isolated: bool,
        not_apart: str | None,
    ) -> None:
        self._config = config
        self._pinned = pinned
        self._log = log
        self._not_apart = not_apart
        self.device: str | None = None
        """The device that trains; None while the trainer starts."""
        self.memory: Callable[[], str | None] = lambda: None
        """Returns the memory in use, for people."""
        self._decisions = Decisions(config.state_folder)
        self._isolated = isolated

    def relayed(self, trainer: "Trainer", socket: Path) -> SocketServer:
        """The server for the relay."""
        server = SocketServer(socket, RELAY_MODE)
        largest = trainer.largest_request
        server.add(
            TRAINER,
            {
                "Handle": handle_method(trainer.handle, largest),
                "Largest": largest_method(largest),
            },
        )
        return server

    def control(self) -> SocketServer:
        """The server for the site's people."""
        server = SocketServer(self._config.state_folder.control_socket, CONTROL_MODE)
        server.add(
            CONTROL,
            {"Status": status_method(self._status), "Watch": watch_method(self._log.events)},
        )
        return server

    def _status(self) -> TrainerStatus:
        return TrainerStatus(
            site=self._config.site,
            federation=self._pinned.roster.federation,
            isolated=self._isolated,
            paused=self._decisions.is_paused,
            waiting=tuple(proposal.plan.job for proposal in self._decisions.proposals()),
            epsilon=self._log.epsilon,
            last=self._log.last,
            not_apart=self._not_apart,
            device=self.device,
            memory=self.memory(),
            starting=self.device is None,
            pinned=self._pinned.mark(),
            shared=self._log.shared,
        )
