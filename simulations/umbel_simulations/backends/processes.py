"""A federation of real processes on this machine, set up by the commands that people would run.

It has all parts of a deployment: certificates, a server with its port, relays, trainers without a
network, approvals. But there is only one machine, and nobody compares fingerprints aloud.
"""

import json
import secrets
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umbel_common.errors import JobFailed, RunExists, UmbelError
from umbel_common.plans.plan_file import plan_from_json
from umbel_common.trust.enrolment import request_from_json
from umbel_common.trust.identity import fingerprint
from umbel_common.trust.roster_file import roster_from_json
from umbel_host.processes.supervisor import our_module
from umbel_simulations.backends.draft import draft_toml
from umbel_simulations.backends.site_config import client_toml
from umbel_simulations.inputs.base_model import model_folder
from umbel_simulations.inputs.partition import partition, site_data, unit_count, write_site_data
from umbel_simulations.inputs.sources import load_source
from umbel_simulations.scenario.scenario import Scenario

HOLDOUT = "public.jsonl"
"""Where the operator has the public records."""
MODULES = {"umbel-server": "umbel_server.cli", "umbel-client": "umbel_client.cli"}
_POLL_SECONDS = 0.5
_STOPPING_SECONDS = 90.0
_DECIDING_SECONDS = 120.0

Say = Callable[[str], None]
"""Shows a line to the user."""


@dataclass(frozen=True)
class Party:
    """Someone who runs commands in a folder of their own."""

    folder: Path
    say: Say

    def run(self, command: str, *arguments: str, shown: bool = True) -> str:
        """Runs a command and returns its output.

        Raises:
            UmbelError: the command failed; the error has its output.
        """
        if shown:
            self.say(f"{self.folder.name}$ {command} {' '.join(arguments)}")
        done = subprocess.run(  # noqa: S603  # our own modules
            our_module(MODULES[command], *arguments),
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
        """Keeps `COMMAND run` running, with its log in `run.log`."""
        self.say(f"{self.folder.name}$ {command} run &")
        with (self.folder / "run.log").open("ab") as log:
            process = subprocess.Popen(  # noqa: S603  # our own modules
                our_module(MODULES[command], "run"),
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
    """Sets up all parties, runs the scenario's job, and returns the folder of the adapter.

    Raises:
        RunExists: the folder is not empty.
        UmbelError: the reason why a command or the job failed.
    """
    if folder.exists() and any(folder.iterdir()):
        raise RunExists(
            "the folder of a federation must be new or empty",
            file=folder,
            remedy="give another --folder, or delete this one",
        )
    model = model_folder(scenario.model).resolve()
    corpus = load_source(scenario)
    data = partition(corpus.train, scenario.sites, scenario.seed)
    folder.mkdir(parents=True, exist_ok=True)
    top = Party(folder, say)
    address = f"127.0.0.1:{_free_port()}"
    top.run("umbel-server", "init", "--federation", scenario.name, "--address", address)
    operator = Party(folder / "operator", say)
    if scenario.release_gate is not None:
        _score_on(operator.folder, site_data(corpus.test), model)
    sites = {name: Party(folder / name, say) for name in sorted(data)}
    for number, (name, site) in enumerate(sites.items()):
        site.folder.mkdir()
        _enrol(operator, site, name, scenario.name)
        # The sites use this machine's register of ledgers, as in a deployment. So the data of
        # each run are a data set of their own.
        run = secrets.token_hex(8)
        write_site_data(site.folder / run, data[name], {"run": run})
        config = client_toml(
            scenario,
            name,
            records=unit_count(data[name]),
            labels=corpus.labels,
            model=model,
            approval="each-plan",
            physical_batch_size="auto",
            device=scenario.compute.device_of(number),
            data=f"{run}/data.jsonl",
            server=address,
        )
        (site.folder / "client.toml").write_text(config, encoding="utf-8")
    _agree(operator, list(sites.values()))
    with ExitStack() as stack:
        stack.enter_context(operator.running("umbel-server"))
        for site in sites.values():
            stack.enter_context(site.running("umbel-client"))
        draft = draft_toml(scenario, corpus.labels, model, HOLDOUT, corpus.titles)
        _work(operator, list(sites.values()), scenario, draft)
        one = next(iter(sites.values()))
        for arguments in (("status",), ("budget", "show")):
            say(one.run("umbel-client", *arguments))
    out = folder / "adapter"
    operator.run("umbel-server", "adapters", "export", scenario.name, "--out", "../adapter")
    return out


def _score_on(operator: Path, public: bytes, model: Path) -> None:
    """Lets the operator's server score adapters, which a release gate asks for."""
    (operator / HOLDOUT).write_bytes(public)
    table = f'holdout = "{HOLDOUT}"\nmodel = {json.dumps(str(model))}\nanswers = 0\n'
    with (operator / "server.toml").open("a", encoding="utf-8") as file:
        file.write(f"\n[evaluation]\n{table}")


def _enrol(operator: Party, site: Party, name: str, federation: str) -> None:
    """The site makes its request, the operator admits it, and the site takes its certificate."""
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
    """Every site pins the roster of all sites."""
    operator.run("umbel-server", "roster", "export", "--out", "../roster.json")
    path = operator.folder.parent / "roster.json"
    digest = roster_from_json(path.read_text(encoding="utf-8"), path).digest().hex()
    for site in sites:
        site.run("umbel-client", "roster", "approve", "../roster.json", "--digest", digest)


def _work(operator: Party, sites: Sequence[Party], scenario: Scenario, text: str) -> None:
    """Takes the job from the text of its plan's draft to its last release."""
    draft = operator.folder / "draft.toml"
    draft.write_text(text, encoding="utf-8")
    operator.run("umbel-server", "plan", "new", draft.name, "--out", "plan.json")
    operator.run("umbel-server", "plan", "sign", "plan.json", "--out", "signed.json")
    operator.run("umbel-server", "job", "start", "signed.json")
    signed = (operator.folder / "signed.json").read_text(encoding="utf-8")
    digest = plan_from_json(signed, "signed.json")[0].digest().hex()
    for site in sites:
        _wait_for_plan(operator, site, scenario.name)
        site.run("umbel-client", "approve", scenario.name, "--digest", digest)
    _follow(operator, scenario.name)


def _wait_for_plan(operator: Party, site: Party, job: str) -> None:
    deadline = time.monotonic() + _DECIDING_SECONDS
    while job not in _waiting(site):
        _status(operator, job)
        if time.monotonic() > deadline:
            raise JobFailed(
                "no plan reached a site",
                file=site.folder / "run.log",
                remedy="read this log and operator/run.log for the reason",
            )
        time.sleep(_POLL_SECONDS)


def _waiting(site: Party) -> set[str]:
    rows = json.loads(site.run("umbel-client", "plans", "--json", shown=False))
    return {row["job"] for row in rows}


def _status(operator: Party, job: str) -> dict[str, Any]:
    """What the operator is told of the job.

    Raises:
        JobFailed: it ended without an adapter.
    """
    said = operator.run("umbel-server", "job", "status", job, "--json", shown=False)
    status: dict[str, Any] = json.loads(said)
    if status["state"] in ("failed", "stopped"):
        raise JobFailed("the job did not finish", field=job, found=status["detail"])
    return status


def _follow(operator: Party, job: str) -> None:
    """Reports the progress of the job until it is over."""
    operator.say(f"{operator.folder.name}$ umbel-server job status {job}")
    said = None
    while True:
        status = _status(operator, job)
        now = f"  round {status['round']}, {status['stage']}: {', '.join(status['answered'])}"
        if status["stage"] and now != said:
            operator.say(now)
            said = now
        if status["state"] == "finished":
            return
        time.sleep(_POLL_SECONDS)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
