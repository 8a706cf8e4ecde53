"""A site in a process of its own, which is killed at a chosen step."""

import os
import signal
import sqlite3
from collections.abc import Callable
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

from umbel_client.privacy.calibration import noise_for
from umbel_client.site.config import load_config
from umbel_client.site.ipc import SharedEpsilon
from umbel_client.site.pinned_roster import load_pinned
from umbel_client.trainer.handler import Trainer
from umbel_common.errors import UmbelError
from umbel_common.plans.plan import TrainingPlan
from umbel_host.files.keys import read_identity

AT = "killed-at"
"""Name of the file beside client.toml that says before which step the site was killed."""


class Quiet:
    """An observer that tells nobody anything."""

    def preparing(self, what: str, done: int, total: int) -> None: ...

    def charged(
        self,
        round_number: int,
        epsilon: float | None,
        *,
        again: bool,
        shared: SharedEpsilon | None = None,
    ) -> None: ...

    def step(self, round_number: int, step: int, steps: int, records: float) -> None: ...

    def finished(self, job: str, adapter: Path) -> None: ...

    def refused(self, error: UmbelError) -> None: ...


Step = Callable[[str], None]
"""A function that counts a step, or ends the site's process if the site is to die there."""


Prepare = Callable[[Path, Step], Step]
"""A function that runs in a site's process before the site starts, with the folder of client.toml.
It may count other steps too, and returns the function that is called at every step."""


def only_databases_and_answers(folder: Path, count: Step) -> Step:
    """Counts only the steps that `serve` finds."""
    return count


def nursery(
    folder: Path,
    address: str,
    plan: TrainingPlan,
    public_size: int,
    prepare: Prepare,
    orders: Connection,
) -> None:
    """Starts a site for each number of steps that it receives, once the site before has died.

    A site is a fork of this process, which has imported everything and calibrated the noise, so it
    starts at once.
    """
    noise_for(plan, public_size)
    for steps in iter(orders.recv, None):
        child = os.fork()
        if child == 0:
            serve(folder, address, steps, prepare)
        os.waitpid(child, 0)


def serve(folder: Path, address: str, steps: int, prepare: Prepare) -> None:
    """Answers requests until `steps` steps are done, then dies as if by `kill -9`.

    A step is a statement to one of the site's databases, or the sending of an answer.
    """
    connection = Client(address)
    connection.send(os.getpid())
    left = steps

    def count(what: str) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            (folder / AT).write_text(what)
            os.kill(os.getpid(), signal.SIGKILL)

    step = prepare(folder, count)
    connect = sqlite3.connect

    def counted(*arguments: Any, **options: Any) -> sqlite3.Connection:
        database = connect(*arguments, **options)
        # Called before each statement, COMMIT included.
        database.set_trace_callback(step)
        return database

    sqlite3.connect = counted  # type: ignore[assignment]  # in this process only
    config = load_config(folder / "client.toml")
    identity = read_identity(Path(config.identity))
    trainer = Trainer(config, load_pinned(config), identity, observer=Quiet())
    while True:
        reply = trainer.handle(connection.recv_bytes())
        step("answer")
        connection.send_bytes(reply)
