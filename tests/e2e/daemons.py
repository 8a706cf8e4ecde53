"""An operator's and three sites' folders as people set them up, and their real processes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from umbel_client.drafting import read_plan
from umbel_client.ipc import ControlStub, TrainerStatus, TrainerStub
from umbel_client.model import folder_digest
from umbel_common.errors import UnreachableError
from umbel_common.identity import Identity, Member, Roster, sign
from umbel_common.plan import TrainingPlan
from umbel_common.roster_document import RosterDocument
from umbel_common.roster_file import roster_to_json
from umbel_host.keys import write_identity
from umbel_server.ports import JobStopped, Limits, Link, Step
from umbel_server.queue import JobQueue, QueuedJob
from umbel_server.rounds import Rounds

SITES = ("east", "north", "south")

DRAFT = """\
federation = "clinics"
job = "triage"
seed = 5

[model]
name = "tiny"
path = {model}

[task]
labels = ["a", "b"]

[lora]
rank = 2
alpha = 4.0
target_modules = ["query"]
method = "ffa"

[training]
rounds = 3
local_steps = 2
expected_batch_size = 8
optimizer = {{ optimizer = "sgd", adapter_learning_rate = 0.1, head_learning_rate = 0.1 }}

[privacy]
mode = "local"
epsilon = 8.0
delta = 1e-4
clip_norm = 1.0

[aggregation]
threshold = 2
clip_range = 1.0
step = 1e-6
"""

CLIENT_TOML = """\
site = "{site}"
state = "state"
identity = "identity.pem"
roster = "roster.json"

[data]
path = "data.jsonl"
public_size = 40

[model]
path = {model}

[relay]
server = "127.0.0.1:9"
socket = "run/trainer.sock"

[policy]
models = ["{digest}"]
labels = ["a", "b"]
max_epsilon = 8.0
total_epsilon = 20.0
max_delta = 1e-4
minimum_cohort = 2
colluding_sites = 0
{policy}
"""


class Daemon:
    """One process of ours, which a test may kill and start again."""

    def __init__(self, folder: Path, module: str, *arguments: str) -> None:
        self.log = folder / f"{module.rpartition('.')[2]}.log"
        self._command = [sys.executable, "-m", module, *arguments]
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, cwd=self._folder, stdout=log, stderr=log
            )

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """As the kernel does when memory runs out."""
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """As a service manager does; its exit code."""
        return self._end(signal.SIGTERM)

    def wait(self, seconds: float = 60) -> int:
        """The exit code of a process that ends by itself."""
        assert self._process is not None
        return self._process.wait(seconds)

    def _end(self, how: signal.Signals) -> int:
        assert self._process is not None
        if self._process.poll() is None:
            self._process.send_signal(how)
        try:
            return self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise


class Site:
    """One site's folder and its trainer."""

    def __init__(self, folder: Path, model: Path, policy: str) -> None:
        self.name = folder.name
        self.folder = folder
        folder.mkdir(parents=True)
        self.identity = Identity.generate(os.urandom)
        write_identity(folder / "identity.pem", self.identity)
        self._write_data()
        digest = folder_digest(model).hex()
        toml = CLIENT_TOML.format(
            site=self.name, model=json.dumps(str(model)), digest=digest, policy=policy
        )
        self.config = folder / "client.toml"
        self.config.write_text(toml)
        self.socket = folder / "run" / "trainer.sock"
        self.trainer = Daemon(folder, "umbel_client.trainer_process", str(self.config))

    def _write_data(self) -> None:
        random = np.random.default_rng(sum(self.name.encode()))
        rows = [
            {"text": " ".join(f"w{word}" for word in random.integers(0, 35, 5)), "label": label}
            for label in ("a", "b") * 20
        ]
        (self.folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")

    def status(self) -> TrainerStatus:
        """Of its trainer, which may still be starting."""
        deadline = time.monotonic() + 60
        while True:
            stub = ControlStub(self.folder / "state" / "control.sock")
            try:
                return stub.status()
            except UnreachableError:
                if time.monotonic() > deadline or not self.trainer.running:
                    raise AssertionError(self.trainer.log.read_text()) from None
                time.sleep(0.1)
            finally:
                stub.close()


class Clinics:
    """An operator, and sites whose trainers are processes."""

    def __init__(self, folder: Path, model: Path, policy: str = 'approval = "none"') -> None:
        self.folder = folder
        self.sites = {name: Site(folder / name, model, policy) for name in SITES}
        self.operator = Identity.generate(os.urandom)
        members = (
            Member(name=site.name, public_key=site.identity.public_key)
            for site in self.sites.values()
        )
        self.roster = Roster(
            federation="clinics", operator=self.operator.public_key, members=tuple(members)
        )
        for site in self.sites.values():
            (site.folder / "roster.json").write_text(roster_to_json(self.roster))
        self.draft = folder / "draft.toml"
        self.draft.write_text(DRAFT.format(model=json.dumps(str(model))))
        self.queue = JobQueue(folder / "operator" / "queue.sqlite")

    def plan(self) -> TrainingPlan:
        return read_plan(self.draft)

    def start(self) -> None:
        for site in self.sites.values():
            site.trainer.start()

    def close(self) -> None:
        for site in self.sites.values():
            if site.trainer.running:
                site.trainer.kill()
        self.queue.close()

    def rounds(self, link: Callable[[Callable[[], bool]], Link], limits: Limits) -> Rounds:
        """What works off the operator's queue, over a link of the test's."""

        @contextmanager
        def connect(stopped: Callable[[], bool]) -> Iterator[Link]:
            yield link(stopped)

        return Rounds(
            state=self.folder / "operator",
            operator=self.operator,
            queue=self.queue,
            roster=lambda: RosterDocument(self.roster),
            limits=limits,
            connect=connect,
            stopping=lambda: False,
        )

    def run(self, rounds: Rounds) -> QueuedJob:
        """Queues the plan's job and works until it is over."""
        plan = self.plan()
        self.queue.add(plan.job, sign(self.operator, plan))
        rounds.work()
        return self.queue.job(plan.job)


class SocketLink:
    """What the relays and the server do together, on one machine: a message to each socket."""

    def __init__(
        self,
        sites: dict[str, Site],
        stopped: Callable[[], bool],
        before: Callable[[Step, str], None] = lambda step, site: None,
        after: Callable[[Step, str], None] = lambda step, site: None,
    ) -> None:
        """`before`, `after`: called around each message, where a test kills what it likes."""
        self._sites = sites
        self._stopped = stopped
        self._before = before
        self._after = after

    def exchange(
        self, step: Step, requests: Iterable[tuple[str, bytes]], seconds: float
    ) -> Iterator[tuple[str, bytes]]:
        pool = ThreadPoolExecutor(len(self._sites))
        try:
            asked = [pool.submit(self._ask, step, *request) for request in requests]
            for future in as_completed(asked, timeout=seconds):
                yield future.result()
                if self._stopped():
                    raise JobStopped
        except TimeoutError:
            pass
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, step: Step, site: str, sealed: bytes) -> tuple[str, bytes]:
        self._before(step, site)
        stub = TrainerStub(self._sites[site].socket)
        try:
            while True:
                try:
                    reply = stub.handle(sealed)
                except UnreachableError:
                    # As a relay does: the trainer is asked again when it is back.
                    time.sleep(0.05)
                else:
                    self._after(step, site)
                    return site, reply
        finally:
            stub.close()


class Once:
    """Does something at one step, one time."""

    def __init__(self, stage: str, round_number: int, site: str, action: Callable[[], None]):
        self._wanted = (stage, round_number, site)
        self._action = action
        self._lock = threading.Lock()
        self.done = False

    def __call__(self, step: Step, site: str) -> None:
        with self._lock:
            if (step.stage, step.round, site) == self._wanted and not self.done:
                self.done = True
                self._action()
