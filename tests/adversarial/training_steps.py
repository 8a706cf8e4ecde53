"""The steps at which a training site can die, and faults that a test of its death must notice.

The functions here run in the site's own process, before it starts.
"""

import os
import sqlite3
import stat
from pathlib import Path
from typing import Any

import numpy as np
from adversarial.site_process import Quiet, Step

from umbel_client.ledger.ledger import Ledger
from umbel_client.ledger.rows import GENESIS, Computed, Reservation, Reserved, Row, Sent
from umbel_client.storage.deltas import DeltaCache, OptimizerState
from umbel_common.adapters.vector import Vector

GRADIENTS = "gradients"
"""Name of the file beside client.toml with a line for each step of training, its round."""


class Untraced(sqlite3.Connection):
    """A database whose statements are not counted."""

    def set_trace_callback(self, callback: object) -> None: ...


def every_step(folder: Path, count: Step) -> Step:
    """Counts each statement to the ledger, step of training, change of a delta's file, and answer.

    It does not count what comes before the first round that the site charges or finds charged, nor
    statements to the journal, which are those of `test_killed_site`.
    """
    charged = False
    connect, reserve = sqlite3.connect, Ledger.reserve
    fsync, rename = os.fsync, Path.rename

    def step(what: str) -> None:
        if charged:
            count(what)

    def connected(path: Path, **options: Any) -> sqlite3.Connection:
        if path.name == "session.sqlite":
            options["factory"] = Untraced
        return connect(path, **options)

    def reserved(*arguments: Any) -> Reservation:
        nonlocal charged
        charged = True
        return reserve(*arguments)

    def trained(self: Quiet, round_number: int, number: int, steps: int, records: float) -> None:
        with open(folder / GRADIENTS, "a") as file:
            file.write(f"{round_number}\n")
        step("gradient")

    def synced(descriptor: int) -> None:
        mode, size = os.fstat(descriptor).st_mode, os.fstat(descriptor).st_size
        if stat.S_ISREG(mode):
            # Data that was not synced may be lost: a site that dies here leaves half of it.
            whole = Path(f"/proc/self/fd/{descriptor}").read_bytes()
            os.ftruncate(descriptor, size // 2)
            step("file fsync")
            os.pwrite(descriptor, whole, 0)
        else:
            step("folder fsync")
        fsync(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        step("rename")
        return rename(self, target)

    sqlite3.connect = connected  # type: ignore[assignment]  # in this process only
    Ledger.reserve = reserved  # type: ignore[method-assign]  # in this process only
    Quiet.step = trained  # type: ignore[method-assign]  # in this process only
    os.fsync = synced
    Path.rename = renamed  # type: ignore[method-assign, assignment]  # in this process only
    return step


def remember(ledger: Ledger, change: Reserved | Computed | Sent) -> None:
    """Makes a change in memory, and writes nothing."""
    ledger._contents.follow(Row(GENESIS, bytes(16), change))
    ledger._contents.heads.pop()


def recorded_in_memory_only(folder: Path, count: Step) -> Step:
    """A site that sends before it records its delta."""
    step = every_step(folder, count)
    append = Ledger._append

    def late(self: Ledger, change: Reserved | Computed | Sent) -> None:
        if isinstance(change, Reserved):
            append(self, change)
        else:
            remember(self, change)

    Ledger._append = late  # type: ignore[method-assign, assignment]  # in this process only
    return step


def fresh_noise_after_each_start(folder: Path, count: Step) -> Step:
    """A site whose recorded deltas get other noise after each start, as if computed again."""
    step = every_step(folder, count)
    load = DeltaCache.load
    noise = np.float32(int.from_bytes(os.urandom(1)) / 1000)

    def recomputed(
        self: DeltaCache, number: int, expected: bytes, *, with_state: bool = True
    ) -> tuple[bytes, Vector, OptimizerState]:
        adapter, delta, state = load(self, number, expected, with_state=with_state)
        return adapter, delta + noise, state

    DeltaCache.load = recomputed  # type: ignore[method-assign]  # in this process only
    return step


def charged_after_training(folder: Path, count: Step) -> Step:
    """A site that charges a round only when its delta is there."""
    step = every_step(folder, count)
    append, waiting = Ledger._append, list[Reserved]()

    def late(self: Ledger, change: Reserved | Computed | Sent) -> None:
        if isinstance(change, Reserved):
            remember(self, change)
            waiting.append(change)
            return
        for former in waiting:
            del self._contents.rounds[former.job, former.round]
            append(self, former)
        waiting.clear()
        append(self, change)

    Ledger._append = late  # type: ignore[method-assign, assignment]  # in this process only
    return step
