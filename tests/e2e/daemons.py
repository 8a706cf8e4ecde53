"""An operator's and three sites' folders as people set them up, and their real processes."""

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import numpy as np
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from support import warm_python
from support.waiting import HANGING

from umbel_client.planning.draft import read_plan
from umbel_client.site.ipc import ControlStub, TrainerStatus, TrainerStub
from umbel_common.errors import UnreachableError
from umbel_common.plans.plan import TrainingPlan
from umbel_common.trust.identity import Identity, Member, Roster, sign
from umbel_common.trust.roster import RosterDocument
from umbel_common.trust.roster_file import roster_to_json
from umbel_host.files.keys import write_identity
from umbel_host.files.model_digest import folder_digest
from umbel_server.jobs.runner import JobRunner
from umbel_server.messaging.link import JobStopped, Link, Step
from umbel_server.operator.admitted_sites import SiteEntry, save_sites
from umbel_server.operator.authority import (
    Authority,
    certificate_pem,
    key_pem,
    new_authority,
    new_key,
)
from umbel_server.operator.config import Limits
from umbel_server.storage.job_queue import JobQueue, JobState, QueuedJob

SITES = ("east", "north", "south")

DRAFT = """\
federation = "clinics"
job = "triage"
seed = 5

[model]
name = "tiny"
path = {model}

[task]
task = "classification"
labels = ["a", "b"]
max_tokens = 16

[lora]
rank = 2
alpha = 4.0
target_modules = ["query"]
method = "ffa"

[training]
rounds = 3
local_steps = 2
expected_batch_size = 40  # every record: the accountant answers that at once
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

SERVER_TOML = """\
[listen]
address = "127.0.0.1:{port}"

[limits]
attempts = 3
# A busy machine takes its time; a test whose sites stay away has less patience.
offer_seconds = 300
train_seconds = 300
stage_seconds = 300
"""

CLIENT_TOML = """\
site = "{site}"
state = "state"
identity = "identity.pem"
roster = "roster.json"
physical_batch_size = 4

[data]
name = "{site}"
path = "data.jsonl"
public_size = 40

[model]
path = {model}

[relay]
server = "127.0.0.1:{port}"
socket = "run/trainer.sock"

[policy]
models = ["{digest}"]
labels = ["a", "b"]
max_epsilon = 8.0
total_epsilon = 200.0
max_delta = 1e-4
minimum_cohort = 2
colluding_sites = 0
{policy}
"""


class Daemon:
    """One process of ours, which a test may kill and start again."""

    def __init__(self, folder: Path, module: str, *arguments: str) -> None:
        self.log = folder / f"{module.rpartition('.')[2]}.log"
        self._command = ["-P", "-m", module, *arguments]
        self._folder = folder
        self._process: warm_python.Process | None = None

    @classmethod
    def of(cls, folder: Path, script: str, *arguments: str) -> "Daemon":
        """A script of a test's own in a daemon's place."""
        daemon = cls(folder, Path(script).stem, *arguments)
        daemon._command = [script, *arguments]
        return daemon

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = warm_python.start(
                *self._command, cwd=self._folder, stdout=log.fileno(), stderr=log.fileno()
            )

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Of the running process."""
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """As the kernel does when memory runs out."""
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """As a service manager does; its exit code."""
        return self._end(signal.SIGTERM)

    def wait(self) -> int:
        """The exit code of a process that ends by itself."""
        assert self._process is not None
        return self._process.wait()

    def _end(self, how: signal.Signals) -> int:
        assert self._process is not None
        if self._process.poll() is None:
            self._process.send_signal(how)
        try:
            return self._process.wait()
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise


class Site:
    """One site's folder and its trainer."""

    def __init__(self, folder: Path, model: Path, policy: str, port: int) -> None:
        self.name = folder.name
        self.folder = folder
        folder.mkdir(parents=True)
        self.identity = Identity.generate(os.urandom)
        write_identity(folder / "identity.pem", self.identity)
        self._write_data()
        digest = folder_digest(model).hex()
        toml = CLIENT_TOML.format(
            site=self.name,
            model=json.dumps(str(model)),
            digest=digest,
            policy=policy,
            port=port,
        )
        self.config = folder / "client.toml"
        self.config.write_text(toml)
        self.socket = folder / "run" / "trainer.sock"
        self.trainer = Daemon(folder, "umbel_client.trainer_process", str(self.config))
        self.relay_key = new_key()
        self.relay = Daemon(folder, "umbel_client.relay", str(self.config))

    def _write_data(self) -> None:
        random = np.random.default_rng(sum(self.name.encode()))
        rows = [
            {"text": " ".join(f"w{word}" for word in random.integers(0, 35, 5)), "label": label}
            for label in ("a", "b") * 20
        ]
        (self.folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")

    def status(self) -> TrainerStatus:
        """Of its trainer, which may still be starting."""
        deadline = time.monotonic() + HANGING
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

    def __init__(
        self,
        folder: Path,
        model: Path,
        policy: str = 'approval = "none"',
        names: Sequence[str] = SITES,
    ) -> None:
        self.folder = folder
        self.port = free_port()
        self.sites = {name: Site(folder / name, model, policy, self.port) for name in names}
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
        self.operator_folder = folder / "operator"
        self.queue = JobQueue(self.operator_folder / "state" / "queue.sqlite")
        self._write_operator()
        config = str(self.operator_folder / "server.toml")
        self.port_process = Daemon(self.operator_folder, "umbel_server.port_process", config)
        self.rounds_process = Daemon(self.operator_folder, "umbel_server.rounds_process", config)

    def _write_operator(self) -> None:
        folder = self.operator_folder
        (folder / "server.toml").write_text(SERVER_TOML.format(port=self.port))
        (folder / "roster.json").write_text(roster_to_json(self.roster))
        write_identity(folder / "identity.pem", self.operator)
        now, key = datetime.now(UTC), new_key()
        self.authority = Authority(new_authority("clinics", key, now), key)
        server_key = new_key()
        server = self.authority.server(server_key.public_key(), ["127.0.0.1"], now)
        write_all(
            folder,
            {
                "ca/certificate.pem": certificate_pem(self.authority.certificate),
                "tls/certificate.pem": certificate_pem(server),
                "tls/key.pem": key_pem(server_key),
            },
        )
        entries = {}
        for site in self.sites.values():
            certificate = self.authority.site(site.name, site.relay_key.public_key(), now)
            write_all(
                site.folder,
                {
                    "relay/server-ca.pem": certificate_pem(self.authority.certificate),
                    "relay/certificate.pem": certificate_pem(certificate),
                    "relay/key.pem": key_pem(site.relay_key),
                },
            )
            public = site.relay_key.public_key().public_bytes(
                Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
            )
            entries[site.name] = SiteEntry(
                name=site.name,
                relay_key=public.decode(),
                certificate=certificate_pem(certificate).decode(),
            )
        save_sites(folder / "sites.json", entries)

    def limit(self, **limits: float) -> None:
        """Changes how patient the operator is; before the server starts."""
        path = self.operator_folder / "server.toml"
        text = path.read_text()
        for name, value in limits.items():
            (line,) = (line for line in text.splitlines() if line.startswith(f"{name} ="))
            text = text.replace(line, f"{name} = {value}")
        path.write_text(text)

    def start_all(self) -> None:
        """Every process of a federation."""
        self.port_process.start()
        self.rounds_process.start()
        for site in self.sites.values():
            site.trainer.start()
            site.relay.start()

    def wait(self, job: str, *states: JobState, seconds: float = HANGING) -> QueuedJob:
        """Until a job is in one of these states; fails after `seconds`."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            queued = self.queue.job(job)
            if queued.state in states:
                return queued
            time.sleep(0.1)
        raise AssertionError((self.queue.job(job), self.logs()))

    def logs(self) -> str:
        """What every process said."""
        texts = [f"--- {path}\n{path.read_text()[-3000:]}" for path in self.folder.glob("*/*.log")]
        return "\n".join(texts)

    def add(self, **changes: object) -> str:
        """Queues the plan's job; its name."""
        plan = msgspec.structs.replace(self.plan(), **changes)
        self.queue.add(plan.job, sign(self.operator, plan))
        return plan.job

    def plan(self) -> TrainingPlan:
        return read_plan(self.draft)

    def start(self) -> None:
        for site in self.sites.values():
            site.trainer.start()

    def close(self) -> None:
        daemons = [daemon for site in self.sites.values() for daemon in (site.relay, site.trainer)]
        for daemon in (*daemons, self.rounds_process, self.port_process):
            if daemon.running:
                daemon.kill()
        self.queue.close()

    def rounds(self, link: Callable[[Callable[[], bool]], Link], limits: Limits) -> JobRunner:
        """What works off the operator's queue, over a link of the test's."""

        @contextmanager
        def connect(stopped: Callable[[], bool]) -> Iterator[Link]:
            yield link(stopped)

        return JobRunner(
            state=self.operator_folder / "state",
            operator=self.operator,
            queue=self.queue,
            read_roster=lambda: RosterDocument(self.roster),
            limits=limits,
            connect=connect,
            should_stop=lambda: False,
        )

    def run(self, rounds: JobRunner) -> QueuedJob:
        """Queues the plan's job and works until it is over."""
        plan = self.plan()
        self.queue.add(plan.job, sign(self.operator, plan))
        rounds.run_next()
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


def free_port() -> int:
    """A port that nobody uses at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def write_all(folder: Path, files: dict[str, bytes]) -> None:
    """Private files of one party."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        path.chmod(0o600)


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
