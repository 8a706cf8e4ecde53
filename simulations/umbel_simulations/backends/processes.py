"""A federation of real processes on this machine: the commands that people give, given one by one.

Everything that a deployment has is there: certificates, a server with its port, relays, trainers
without a network, approvals. Only the machine is one, and nobody reads out fingerprints.
"""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from umbel_common.errors import JobFailed, RunExists, UmbelError
from umbel_common.plans.plan_file import plan_from_json
from umbel_common.trust.enrolment import request_from_json
from umbel_common.trust.identity import fingerprint
from umbel_common.trust.roster_file import roster_from_json
from umbel_simulations.backends.draft import draft_toml
from umbel_simulations.backends.site_config import client_toml
from umbel_simulations.inputs.base_model import model_folder
from umbel_simulations.inputs.partition import partition, write_site_data
from umbel_simulations.inputs.sources import load_source
from umbel_simulations.scenario.file import require_classification
from umbel_simulations.scenario.scenario import Scenario

MODULES = {"umbel-server": "umbel_server.cli", "umbel-client": "umbel_client.cli"}
_POLL_SECONDS = 0.5
_STOPPING_SECONDS = 90.0
_DECIDING_SECONDS = 120.0

Say = Callable[[str], None]


@dataclass(frozen=True)
class Party:
    """Somebody with a folder of their own, who gives commands in it."""

    folder: Path
    say: Say

    def run(self, command: str, *arguments: str, shown: bool = True) -> str:
        """Gives a command and returns what it printed.

        Raises:
            UmbelError: it failed; what it said is in the error.
        """
        if shown:
            self.say(f"{self.folder.name}$ {command} {' '.join(arguments)}")
        done = subprocess.run(  # noqa: S603  # our own modules
            [sys.executable, "-m", MODULES[command], *arguments],
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise UmbelError(
                f"{command} {' '.join(arguments)} ended with code {done.returncode}",
                file=self.folder,
                found=done.stderr.strip() or done.stdout.strip(),
            )
        return done.stdout

    @contextmanager
    def running(self, command: str) -> Iterator[None]:
        """Keeps `COMMAND run` running; what it logs is in `run.log`."""
        self.say(f"{self.folder.name}$ {command} run &")
        with (self.folder / "run.log").open("ab") as log:
            process = subprocess.Popen(  # noqa: S603  # our own modules
                [sys.executable, "-m", MODULES[command], "run"],
                cwd=self.folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(_STOPPING_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def run_federation(scenario: Scenario, folder: Path, say: Say) -> Path:
    """Sets up everybody, runs the scenario's job, and returns the folder of the adapter.

    Raises:
        ConfigError: the scenario trains a language model.
        RunExists: the folder holds something.
        UmbelError: what made a command or the job fail.
    """
    require_classification(scenario, "federation")
    if folder.exists() and any(folder.iterdir()):
        raise RunExists(
            "a federation is set up in a new folder",
            file=folder,
            remedy="give another --folder, or delete this one",
        )
    folder.mkdir(parents=True, exist_ok=True)
    model = model_folder(scenario.model).resolve()
    corpus = load_source(scenario)
    data = partition(corpus.train, scenario.sites, scenario.seed)
    top = Party(folder, say)
    address = f"127.0.0.1:{_free_port()}"
    top.run("umbel-server", "init", "--federation", scenario.name, "--address", address)
    operator = Party(folder / "operator", say)
    sites = {name: Party(folder / name, say) for name in sorted(data)}
    for name, site in sites.items():
        site.folder.mkdir()
        _enrol(operator, site, name, scenario.name)
        write_site_data(site.folder, data[name])
        config = client_toml(
            scenario,
            name,
            records=len(data[name]),
            labels=corpus.labels,
            model=model,
            approval="each-plan",
            physical_batch_size="auto",
            server=address,
        )
        (site.folder / "client.toml").write_text(config, encoding="utf-8")
    _agree(operator, list(sites.values()))
    with ExitStack() as stack:
        stack.enter_context(operator.running("umbel-server"))
        for site in sites.values():
            stack.enter_context(site.running("umbel-client"))
        _work(operator, list(sites.values()), scenario, corpus.labels, model)
        one = next(iter(sites.values()))
        for arguments in (("status",), ("budget", "show")):
            say(one.run("umbel-client", *arguments))
    out = folder / "adapter"
    operator.run("umbel-server", "adapters", "export", scenario.name, "--out", "../adapter")
    return out


def _enrol(operator: Party, site: Party, name: str, federation: str) -> None:
    """The site asks, the operator compares, the site takes its certificate."""
    site.run("umbel-client", "init", "--site", name, "--federation", federation)
    path = site.folder / f"{name}.request.json"
    asked = request_from_json(path.read_text(encoding="utf-8"), path)
    operator.run(
        "umbel-server",
        "sites",
        "add",
        f"../{name}/{path.name}",
        "--out",
        f"../{name}/kit.json",
        "--fingerprint",
        fingerprint(asked.request.identity),
    )
    site.run("umbel-client", "join", "kit.json")


def _agree(operator: Party, sites: Sequence[Party]) -> None:
    """Everybody pins the roster with everybody."""
    operator.run("umbel-server", "roster", "export", "--out", "../roster.json")
    path = operator.folder.parent / "roster.json"
    digest = roster_from_json(path.read_text(encoding="utf-8"), path).digest().hex()
    for site in sites:
        site.run("umbel-client", "roster", "approve", "../roster.json", "--digest", digest)


def _work(
    operator: Party,
    sites: Sequence[Party],
    scenario: Scenario,
    labels: Sequence[str],
    model: Path,
) -> None:
    """From the plan's draft to the last release."""
    draft = operator.folder / "draft.toml"
    draft.write_text(draft_toml(scenario, labels, model), encoding="utf-8")
    operator.run("umbel-server", "plan", "new", draft.name, "--out", "plan.json")
    operator.run("umbel-server", "plan", "sign", "plan.json", "--out", "signed.json")
    operator.run("umbel-server", "job", "start", "signed.json")
    text = (operator.folder / "signed.json").read_text(encoding="utf-8")
    digest = plan_from_json(text, "signed.json")[0].digest().hex()
    for site in sites:
        _wait_for_plan(site, scenario.name)
        site.run("umbel-client", "approve", scenario.name, "--digest", digest)
    _follow(operator, scenario.name)


def _wait_for_plan(site: Party, job: str) -> None:
    deadline = time.monotonic() + _DECIDING_SECONDS
    while job not in _waiting(site):
        if time.monotonic() > deadline:
            raise JobFailed(
                "no plan reached a site",
                file=site.folder / "run.log",
                remedy="its log, and operator/run.log, say why",
            )
        time.sleep(_POLL_SECONDS)


def _waiting(site: Party) -> set[str]:
    rows = json.loads(site.run("umbel-client", "plans", "--json", shown=False))
    return {row["job"] for row in rows}


def _follow(operator: Party, job: str) -> None:
    """Says where the job is until it is over."""
    operator.say(f"{operator.folder.name}$ umbel-server job status {job}")
    said = None
    while True:
        status = json.loads(
            operator.run("umbel-server", "job", "status", job, "--json", shown=False)
        )
        now = f"  round {status['round']}, {status['stage']}: {', '.join(status['answered'])}"
        if status["stage"] and now != said:
            operator.say(now)
            said = now
        if status["state"] == "finished":
            return
        if status["state"] in ("failed", "stopped"):
            raise JobFailed("the job did not finish", field=job, found=status["detail"])
        time.sleep(_POLL_SECONDS)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
