"""A real site in a process of its own, among sites that the server plays."""

import os
import random
import signal
from collections import Counter
from multiprocessing.connection import Listener
from pathlib import Path
from typing import Any

from adversarial.federation import Federation
from adversarial.site_process import AT, Prepare, only_databases_and_answers
from support import warm_python

from umbel_common.protocol.wire import Reply, open_reply, request_digest, seal_request, size_limit

SITE = "site-00"
PUBLIC_SIZE = 40
TESTS = Path(__file__).parent.parent


class KillableSite:
    """A site's process, started again whenever it has died."""

    def __init__(
        self,
        federation: Federation,
        chance: random.Random,
        *,
        most_steps: int,
        prepare: Prepare = only_databases_and_answers,
    ) -> None:
        self.federation = federation
        self.folder = federation.folder / SITE
        self.chance = chance
        self.most_steps = most_steps
        self.killed_at: Counter[tuple[str, str]] = Counter()
        self.listener = Listener(str(federation.folder / "listener"))
        address = str(self.listener.address)
        self.nursery = warm_python.start("-m", "adversarial.nursery", address, cwd=TESTS)
        self.orders = self.listener.accept()
        self.orders.send((self.folder, federation.plan, PUBLIC_SIZE, prepare))
        self.start()

    def start(self) -> None:
        self.orders.send(self.chance.randrange(self.most_steps))
        self.connection = self.listener.accept()
        self.process: int = self.connection.recv()

    def stop(self) -> None:
        os.kill(self.process, signal.SIGKILL)
        self.orders.send(None)
        self.nursery.wait()
        self.listener.close()

    def ask(self, stage: str, request: Any) -> Reply | None:
        """The answer; None if the site was killed before it sent one."""
        federation = self.federation
        try:
            sealed = seal_request(federation.operator, SITE, request)
            self.connection.send_bytes(sealed)
            reply = self.connection.recv_bytes()
        except (EOFError, ConnectionError):
            statement = (self.folder / AT).read_text().split("(")[0].strip()
            self.killed_at[stage, statement] += 1
            self.start()
            return None
        key = federation.identities[SITE].public_key
        return open_reply(
            key, SITE, reply, request_digest(sealed), limit=size_limit(federation.plan)
        )
