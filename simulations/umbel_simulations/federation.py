"""One federation on this machine: folders as in a deployment, the real server and the real sites.

The server's files are in `server/`, each site's in `sites/<name>/`: its configuration, its own
identity, the roster that it pinned, its data, and the state that its trainer keeps. Nothing here
hands a value from one party to another; that is what the grid's bytes are for.
"""

import json
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from umbel_client.config import load_config, read_identity, write_identity
from umbel_client.flower import answer
from umbel_client.trainer import Trainer
from umbel_common.canonical import Entropy
from umbel_common.identity import Identity, Member, Roster, sign
from umbel_common.plan import TrainingPlan
from umbel_common.roster_file import roster_from_json, roster_to_json
from umbel_common.statements import Release
from umbel_server.flower import GridLink
from umbel_server.job import Job, Limits
from umbel_server.registry import Registry
from umbel_server.store import Store
from umbel_simulations.entropy import seeded
from umbel_simulations.faults import losing
from umbel_simulations.inprocess import InProcessGrid
from umbel_simulations.population import write_site_data
from umbel_simulations.recorder import ServerObserver, SiteObserver
from umbel_simulations.run_folder import write, write_plan, write_signed
from umbel_simulations.scenario import Dropout, Scenario
from umbel_simulations.sources import Example


class Federation:
    """The parties of one run, on disk."""

    def __init__(self, folder: Path, scenario: Scenario) -> None:
        """Args:
        folder: where the parties' folders are, or will be.
        """
        self.folder = folder
        self._scenario = scenario

    def entropy(self, party: str) -> Entropy:
        """The randomness of one party: the operating system's, unless the scenario says insecure."""
        seed = self._scenario.insecure_test_seed
        return os.urandom if seed is None else seeded(seed, party)

    def set_up(self, sites: Mapping[str, Sequence[Example]], model: Path) -> None:
        """Makes what is missing of identities, roster, data and configurations.

        Identities are not seeded by the scenario: two runs of one scenario are two federations.
        """
        operator = self._identity("server", self.folder / "server")
        members = []
        for site in sorted(sites):
            folder = self.site_folder(site)
            identity = self._identity(site, folder)
            members.append(Member(name=site, public_key=identity.public_key))
            if not (folder / "data.jsonl").exists():
                write_site_data(folder, sites[site])
            write(folder / "client.toml", self._client_toml(site, model).encode())
        roster = Roster(
            federation=self._scenario.name, operator=operator.public_key, members=tuple(members)
        )
        text = roster_to_json(roster).encode()
        write(self.folder / "roster.json", text)
        for site in sites:
            write(self.site_folder(site) / "roster.json", text)

    def site_folder(self, site: str) -> Path:
        """Where a site's own files are."""
        return self.folder / "sites" / site

    def roster(self) -> Roster:
        """The roster that everybody pinned."""
        path = self.folder / "roster.json"
        return roster_from_json(path.read_text(encoding="utf-8"), path)

    def run(
        self,
        plan: TrainingPlan,
        sites: Mapping[str, SiteObserver],
        observer: ServerObserver,
        *,
        workers: int,
        dropouts: Sequence[Dropout] = (),
        limits: Limits,
        stop: threading.Event,
    ) -> tuple[Release, dict[str, Trainer]]:
        """Runs the job, or what is left of it, and writes its evidence into the folder.

        Raises:
            UmbelError: what made the job fail; where a site refused the plan, the site's own error,
                since here the developer is also every site's administrator.
        """
        roster = self.roster()
        operator = read_identity(self.folder / "server" / "identity.pem")
        trainers = {site: self._trainer(site, roster, sites[site]) for site in sites}
        nodes = {site: number for number, site in enumerate(sorted(sites), start=2)}
        grid = InProcessGrid(
            {
                number: lambda message, trainer=trainers[site]: answer(message, trainer.handle)
                for site, number in nodes.items()
            },
            workers=workers,
            lost=losing(dropouts, nodes),
        )
        store = Store(self.folder / "server" / "journal.sqlite")
        try:
            job = Job(
                plan,
                roster,
                operator,
                store=store,
                registry=Registry(self.folder / "server" / "registry"),
                link=GridLink(grid, nodes, poll_seconds=0.02),
                observer=observer,
                limits=limits,
            )
            write_plan(self.folder, plan, sign(operator, plan))
            release = job.run()
            return release, trainers
        finally:
            stop.set()
            grid.close()
            write_signed(self.folder / "headers.jsonl", store.headers(plan.job))
            write_signed(self.folder / "transcript.jsonl", store.transcript(plan.job))
            store.close()
            for trainer in trainers.values():
                trainer.close()

    def _identity(self, party: str, folder: Path) -> Identity:
        path = folder / "identity.pem"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_identity(path, Identity.generate(self.entropy(f"{party} identity")))
        return read_identity(path)

    def _trainer(self, site: str, roster: Roster, observer: SiteObserver) -> Trainer:
        config = load_config(self.site_folder(site) / "client.toml")
        return Trainer(
            config,
            roster,
            read_identity(Path(config.identity)),
            observer=observer,
            entropy=self.entropy(site),
        )
