"""What a hundred relays cost the port: `python tests/benchmarks/bench_relays.py` prints JSON.

The process with the port is real, and so is what a relay does; the hundred relays are threads of
this process, each with its own certificate and connections, and an echo in its trainer's place.
They wait for messages for a minute; then each gets a small message, three times.
"""

import json
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench_masking import entry
from e2e.daemons import Clinics
from round_times import cpu
from support.homes import live_in, own_homes
from support.relays import whole

from umbel_client.relay.flower import Connection, serve
from umbel_server.messaging.carrier import CarrierLink
from umbel_server.messaging.link import Step

RELAYS = 100
IDLE_SECONDS = 60.0
EXCHANGES = 3
SMALL = bytes(2_000)


def measure() -> dict[str, dict[str, Any]]:
    """Name -> {value, unit, target, holds}; without a target, both of the last are None."""
    own_homes()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        live_in(folder)
        model = Path(folder) / "model"
        model.mkdir()
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            (model / name).write_text("{}")
        names = [f"site-{number:03}" for number in range(RELAYS)]
        clinics = Clinics(Path(folder) / "clinics", model, names=names)
        stack.callback(clinics.close)
        clinics.port_process.start()
        connected(clinics, stack)
        return _figures(clinics)


def connected(clinics: Clinics, stack: ExitStack) -> None:
    """Starts a relay for each site; returns when all are connected."""
    stopping = threading.Event()
    there = threading.Semaphore(0)
    threads = []
    for site in clinics.sites.values():
        relay = site.folder / "relay"
        connection = Connection(
            server=f"127.0.0.1:{clinics.port}",
            server_ca=relay / "server-ca.pem",
            certificate=relay / "certificate.pem",
            key=relay / "key.pem",
        )

        def told(is_connected: bool) -> None:
            if is_connected:
                there.release()

        threads.append(
            threading.Thread(
                target=serve, args=(connection, whole(lambda sealed: sealed), stopping, told)
            )
        )
        threads[-1].start()

    def end() -> None:
        stopping.set()
        for thread in threads:
            thread.join()

    stack.callback(end)
    for _ in threads:
        assert there.acquire(timeout=300)


def _figures(clinics: Clinics) -> dict[str, dict[str, Any]]:
    pid = clinics.port_process.pid
    time.sleep(5)
    began, before = time.monotonic(), cpu(pid)
    time.sleep(IDLE_SECONDS)
    idle = (cpu(pid) - before) / (time.monotonic() - began)
    link = CarrierLink(clinics.operator_folder / "state" / "carrier.sock")
    seconds, spent = [], cpu(pid)
    for number in range(EXCHANGES):
        began = time.monotonic()
        requests = ((name, SMALL) for name in clinics.sites)
        replies = dict(link.exchange(Step("share", number, 1), requests, 300))
        assert len(replies) == len(clinics.sites)
        seconds.append(time.monotonic() - began)
    spent = cpu(pid) - spent
    link.close()
    status = Path(f"/proc/{pid}/status").read_text()
    (resident,) = (line for line in status.splitlines() if line.startswith("VmRSS:"))
    return {
        "port_100_relays_cpu_share": entry(idle, "of a core, idle", None),
        "port_100_relays_stage_s": entry(min(seconds), "s", None),
        "port_100_relays_message_cpu_ms": entry(
            1000 * spent / (EXCHANGES * len(clinics.sites)), "ms of CPU", None
        ),
        "port_100_relays_memory_mb": entry(int(resident.split()[1]) / 1000, "MB", None),
    }


if __name__ == "__main__":
    print(json.dumps(measure(), indent=2))
