"""What a large message costs on its way: `python tests/benchmarks/bench_transport.py` prints JSON.

A message of 200 MB goes to each of three sites, and as much comes back, over the real port: relays
whose trainers are echoes, the process with the port, and this process in place of the job's. Peak
of each process' memory beyond what it needs for a small message, in sizes of the message; for a
relay without its echo's own copy. Seconds are wall clock, with all processes on this machine.
"""

import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench_masking import entry
from e2e.daemons import SITES, Clinics
from e2e.transport import STEP, Transport

from umbel_server.carrier import CarrierLink

MEGABYTES = 200
LOOK_SECONDS = 0.02


def measure(megabytes: int = MEGABYTES) -> dict[str, dict[str, Any]]:
    """Name -> {value, unit, target, holds}; without a target, both of the last are None."""
    with tempfile.TemporaryDirectory() as folder:
        transport = Transport(Clinics(Path(folder) / "clinics", empty_model(Path(folder))))
        try:
            transport.start()
            return exchange(transport, megabytes * 1_000_000)
        finally:
            transport.close()


def exchange(transport: Transport, size: int) -> dict[str, dict[str, Any]]:
    """One step with messages of `size` bytes."""
    processes = {
        "relay": transport.relays["north"].pid,
        "port": transport.port_pid,
        "job": os.getpid(),
    }

    def requests() -> Iterator[tuple[str, bytes]]:
        for site in SITES:
            yield site, os.urandom(size)

    began = time.monotonic()
    with Peaks(processes) as peaks, closing(CarrierLink(transport.socket)) as link:
        answered = 0
        for _, reply in link.exchange(STEP, requests(), 600):
            assert len(reply) == size
            answered += 1
            del reply
    seconds = time.monotonic() - began
    assert answered == len(SITES), transport.logs()
    copies = {name: growth / size for name, growth in peaks.growth().items()}
    # Its echo turns the message round, where a real relay hands it to the trainer.
    copies["relay"] -= 1
    figures = {
        f"transport_{name}_memory": entry(value, "messages", None) for name, value in copies.items()
    }
    return {**figures, "transport_seconds": entry(seconds, "s", None)}


def empty_model(folder: Path) -> Path:
    """What a site's configuration names, and nobody opens here."""
    model = folder / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (model / name).write_text("{}")
    return model


class Peaks:
    """Most anonymous memory of processes, looked at again and again.

    The kernel's own peak counts the database's pages too, which SQLite maps and the kernel takes
    back when it needs them.
    """

    def __init__(self, processes: dict[str, int]) -> None:
        self._processes = processes
        self._before = self._now()
        self._most = dict(self._before)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "Peaks":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def growth(self) -> dict[str, int]:
        """Bytes beyond those of the beginning."""
        return {name: most - self._before[name] for name, most in self._most.items()}

    def _watch(self) -> None:
        while not self._over.wait(LOOK_SECONDS):
            for name, found in self._now().items():
                self._most[name] = max(self._most[name], found)

    def _now(self) -> dict[str, int]:
        return {name: anonymous(pid) for name, pid in self._processes.items()}


def anonymous(pid: int) -> int:
    """Resident memory in bytes that belongs to no file."""
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("RssAnon:"))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    print(json.dumps(measure(), indent=2))
