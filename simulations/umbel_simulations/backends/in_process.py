"""One federation on this machine: folders as in a deployment, the real server and the real sites.

The server's files are in `server/`. Each site's files are in `sites/<name>/`: its configuration,
its own identity, the roster that it pinned, its data, and its trainer's state. Values pass from one
party to another only as bytes through the grid.
"""

import hashlib
import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from umbel_client.ledger.register import Register
from umbel_client.relay.messages import answer_message
from umbel_client.site.config import ClientConfig, load_config
from umbel_client.site.pinned_roster import load_pinned
from umbel_client.trainer.handler import Trainer
from umbel_client.trainer.job import SiteStatus
from umbel_common.adapters.vector import Vector
from umbel_common.canonical import Entropy
from umbel_common.errors import JobFailed
from umbel_common.plans.plan import TrainingPlan
from umbel_common.plans.statements import Release
from umbel_common.trust.identity import Identity, Member, Roster, sign
from umbel_common.trust.roster_file import roster_from_json, roster_to_json
from umbel_host.files.keys import read_identity, write_identity
from umbel_host.files.start_file import write_start
from umbel_server.jobs.interfaces import Evaluator
from umbel_server.jobs.job import Job
from umbel_server.operator.config import Limits
from umbel_server.storage.journal import Journal
from umbel_server.storage.registry import Registry
from umbel_simulations.backends.faults import planned_losses
from umbel_simulations.backends.grid import InProcessGrid, Node
from umbel_simulations.backends.grid_link import GridLink
from umbel_simulations.backends.site_config import client_toml
from umbel_simulations.inputs.partition import unit_count, write_site_data
from umbel_simulations.inputs.sources import Example
from umbel_simulations.reporting.recorder import ServerObserver, SiteObserver
from umbel_simulations.scenario.run_folder import START_FILE, write, write_plan, write_signed
from umbel_simulations.scenario.scenario import Dropout, Scenario

POLL_SECONDS = 0.02
LIMITS = Limits(offer_seconds=600.0)
"""All sites share this machine, so each one waits while the others read data and load the model."""


@dataclass(frozen=True)
class JobOutcome:
    """What a finished job leaves, as seen by someone who sees the whole simulation."""

    release: Release
    adapter: Vector
    """The last global adapter."""
    status: dict[str, SiteStatus]
    """Status of each site; in a deployment only the site's own people see it."""


class Federation:
    """The parties of one run, on disk."""

    def __init__(self, folder: Path, scenario: Scenario) -> None:
        """Args:
        folder: folder of the parties' folders; `set_up` makes what is missing.
        scenario: what the sites' policies allow.
        """
        self.folder = folder
        self._scenario = scenario

    def entropy(self, party: str) -> Entropy:
        """A party's randomness: from the operating system, unless there is an insecure seed."""
        seed = self._scenario.insecure_test_seed
        return os.urandom if seed is None else seeded(seed, party)

    def set_up(
        self, sites: Mapping[str, Sequence[Example]], labels: Sequence[str], model: Path
    ) -> None:
        """Makes the identities, the roster, the data and the configurations that are missing.

        Identities do not come from the scenario's seed: two runs of one scenario are two
        federations.
        """
        operator = self._identity("server", self.folder / "server")
        members = []
        for number, site in enumerate(sorted(sites)):
            folder = self.site_folder(site)
            identity = self._identity(site, folder)
            members.append(Member(name=site, public_key=identity.public_key))
            if not (folder / "data.jsonl").exists():
                write_site_data(folder, sites[site])
            config = client_toml(
                self._scenario,
                site,
                records=unit_count(sites[site]),
                labels=labels,
                model=model,
                approval="none",
                physical_batch_size=self._scenario.compute.site_batch_size,
                device=self._scenario.compute.device_of(number),
            )
            write(folder / "client.toml", config.encode())
        roster = Roster(
            federation=self._scenario.name, operator=operator.public_key, members=tuple(members)
        )
        text = roster_to_json(roster).encode()
        write(self.folder / "roster.json", text)
        for site in sites:
            write(self.site_folder(site) / "roster.json", text)

    def site_folder(self, site: str) -> Path:
        """The folder of a site's own files."""
        return self.folder / "sites" / site

    def site_config(self, site: str) -> ClientConfig:
        """A site's configuration, read from its own file."""
        return load_config(self.site_folder(site) / "client.toml")

    @property
    def _ledgers(self) -> Path:
        return self.folder / "ledgers"

    def registry(self) -> Registry:
        """The adapters that the operator keeps."""
        return Registry(self.folder / "server" / "registry")

    def roster(self) -> Roster:
        """The roster that all parties pinned."""
        path = self.folder / "roster.json"
        return roster_from_json(path.read_text(encoding="utf-8"), path)

    def run(
        self,
        plan: TrainingPlan,
        sites: Mapping[str, SiteObserver],
        observer: ServerObserver,
        *,
        workers: int,
        dropouts: Sequence[Dropout],
        stop: threading.Event,
        evaluator: Evaluator | None = None,
        start: Vector | None = None,
    ) -> JobOutcome:
        """Runs the job, or resumes it, and writes its evidence into the folder.

        Args:
            workers: number of sites that work at the same time.
            stop: set when the job is over, so that sites still at work stop.
            evaluator: scores adapters for the plan's release gate.
            start: the tensor that the plan names as its start, as `umbel-server job start` takes it
                with the plan.

        Raises:
            UmbelError: what made the job fail. If sites refused, it is the first site's own error,
                since here the developer is also the administrator of every site.
        """
        operator = read_identity(self.folder / "server" / "identity.pem")
        learn_types()
        # The folder of a run may be moved and copied, and the register names places.
        shutil.rmtree(self._ledgers, ignore_errors=True)
        registry = self.registry()
        with ExitStack() as stack:
            store = Journal(self.folder / "server" / "journal.sqlite")
            stack.callback(store.close)
            trainers = {
                site: stack.enter_context(closing(self._trainer(site, sites[site])))
                for site in sites
            }
            nodes = {site: number for number, site in enumerate(sorted(sites), start=2)}
            grid = InProcessGrid(
                {number: _node(trainers[site]) for site, number in nodes.items()},
                workers=workers,
                should_lose=planned_losses(dropouts, nodes),
            )
            stack.callback(grid.close)
            stack.callback(stop.set)
            job = Job(
                plan,
                self.roster(),
                operator,
                journal=store,
                registry=registry,
                link=GridLink(grid, nodes, poll_seconds=POLL_SECONDS),
                observer=observer,
                limits=LIMITS,
                evaluator=evaluator,
            )
            write_plan(self.folder, plan, sign(operator, plan))
            if start is not None:
                registry.keep_start(plan, start)
                write_start(self.folder / START_FILE, plan, start)
            try:
                release = job.run()
            except JobFailed as error:
                raise next((e for site in sites.values() for e in site.errors), error) from None
            finally:
                write_signed(self.folder / "headers.jsonl", store.headers(plan.job))
                write_signed(self.folder / "transcript.jsonl", store.transcript(plan.job))
            status = {site: trainer.status(plan.job) for site, trainer in trainers.items()}
        return JobOutcome(
            release=release, adapter=registry.load(plan, release.adapter), status=status
        )

    def _identity(self, party: str, folder: Path) -> Identity:
        path = folder / "identity.pem"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_identity(path, Identity.generate(self.entropy(f"{party} identity")))
        return read_identity(path)

    def _trainer(self, site: str, observer: SiteObserver) -> Trainer:
        config = self.site_config(site)
        return Trainer(
            config,
            load_pinned(config),
            read_identity(Path(config.identity)),
            observer=observer,
            # The run has its own: its data are copies that everybody has, and runs are repeated.
            register=Register(self._ledgers),
            entropy=self.entropy(site),
        )


def learn_types() -> None:
    """Lets msgspec learn every type of ours now, in one thread.

    It learns a type when it first decodes it. Sites that do so at the same moment, in threads of
    one process, can meet a type that is half learnt, which ends the process.
    """
    pending = [msgspec.Struct]
    while pending:
        kinds = pending.pop().__subclasses__()
        pending += kinds
        for kind in kinds:
            if kind.__module__.startswith("umbel_"):
                with suppress(TypeError, NameError):  # some are never decoded
                    msgspec.msgpack.Decoder(kind)


def _node(trainer: Trainer) -> Node:
    return lambda message: answer_message(message, trainer.handle)


def seeded(seed: int, party: str) -> Entropy:
    """A stream of bytes that anyone who knows the seed can compute. It makes nothing private.

    Each party has its own stream, so the order in which sites work does not matter.
    """
    lock = threading.Lock()
    drawn = 0

    def entropy(size: int) -> bytes:
        nonlocal drawn
        with lock:
            drawn += 1
            label = f"insecure test seed {seed} {party} {drawn}"
        return hashlib.shake_256(label.encode()).digest(size)

    return entropy
