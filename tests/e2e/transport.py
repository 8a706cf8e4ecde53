"""What carries sealed bytes: the real port, and three relays whose trainers are echoes."""

import os
import signal
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from e2e import echo_relay
from e2e.daemons import SITES, Clinics
from support import warm_python
from support.waiting import HANGING

from umbel_server.messaging.carrier import CarrierLink
from umbel_server.messaging.link import Step

STEP = Step("mask", 1, 1)


class EchoRelay:
    """One site's relay, which a test may kill and start again."""

    def __init__(self, folder: Path, port: int) -> None:
        self.log = folder / "echo.log"
        self.asked_log = folder / "asked.log"
        self._command = [echo_relay.__file__, f"127.0.0.1:{port}", str(folder)]
        self._process: warm_python.Process | None = None

    def start(self, clock_ahead: float = 0, **environment: str) -> None:
        with self.log.open("ab") as log:
            self._process = warm_python.start(
                *self._command,
                clock_ahead,
                stdout=log.fileno(),
                stderr=log.fileno(),
                env={**os.environ, **environment},
            )

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def stop(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        self._process.wait()

    def asked(self) -> int:
        """How many messages have reached the echo."""
        return len(self.asked_log.read_text().split()) if self.asked_log.exists() else 0


class Transport:
    """The port's process, three relays, and the link that a job has."""

    def __init__(self, clinics: Clinics) -> None:
        self.clinics = clinics
        self.port = clinics.port_process
        self.relays = {
            name: EchoRelay(site.folder / "relay", clinics.port)
            for name, site in clinics.sites.items()
        }
        self.socket = clinics.operator_folder / "state" / "carrier.sock"

    @property
    def port_pid(self) -> int:
        return self.port.pid

    def start(self) -> None:
        """Until every relay is connected."""
        self.port.start()
        for relay in self.relays.values():
            relay.start()
        answered = self.exchange({name: name.encode() for name in SITES}, 60)
        assert set(answered) == set(SITES), self.logs()

    def close(self) -> None:
        for relay in self.relays.values():
            relay.kill()
        self.clinics.close()

    def exchange(
        self, requests: dict[str, bytes], seconds: float, step: Step = STEP
    ) -> dict[str, bytes]:
        # An echo is as large as what it answers.
        step = replace(step, largest_reply=max(map(len, requests.values())))
        with closing(CarrierLink(self.socket)) as link:
            return dict(link.exchange(step, requests.items(), seconds))

    def logs(self) -> str:
        """What relays and server said."""
        texts = [relay.log.read_text()[-2000:] for relay in self.relays.values()]
        return "\n".join([*texts, self.clinics.logs()])

    def expect_asked(self, site: str, count: int) -> None:
        """Waits until so many messages have reached a site."""
        deadline = time.monotonic() + HANGING
        while self.relays[site].asked() < count:
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.02)
