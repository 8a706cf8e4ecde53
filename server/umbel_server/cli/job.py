"""`umbel-server job`: start, stop, resume, status. The server need not be running."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.table import Table

from umbel_common.adapters.site_counts import SiteCounts
from umbel_common.canonical import decode_canonical
from umbel_common.errors import PlanError, UmbelError
from umbel_common.plans.figures import figures_text
from umbel_common.plans.plan import PLAN_VERSIONS, TrainingPlan
from umbel_common.plans.plan_file import plan_from_json, plan_lines
from umbel_common.plans.start import LabelNamesStart, SeedStart
from umbel_common.plans.statements import HEADER_VERSIONS
from umbel_common.protocol.transcript import Entry, RoundReleased
from umbel_common.trust.identity import open_signed
from umbel_host.files.keys import read_identity
from umbel_host.files.start_file import read_start, start_file
from umbel_host.files.text_file import read_text
from umbel_host.terminal import Screen, confirm, local_time, print_json, print_lines, say, table
from umbel_server.cli.job_view import (
    NOT_RUNNING,
    Seen,
    Server,
    job_json,
    look,
    print_job,
    sites_behind,
    state_text,
)
from umbel_server.cli.options import SERVER_TOML, Config, Json, Unchecked
from umbel_server.jobs.evaluator import check_evaluation
from umbel_server.operator.config import ServerConfig, load_config, load_roster
from umbel_server.operator.plan_signing import require_tried, sign_as_operator
from umbel_server.storage.job_queue import JobQueue, QueuedJob
from umbel_server.storage.journal import Evaluated, Journal
from umbel_server.storage.registry import Registry

job = typer.Typer(help="Jobs: start, stop, resume, status.", no_args_is_help=True)

_SHOWN = 5
"""Number of rounds whose figures are printed; `--json` has all of them."""
Name = Annotated[str, typer.Argument(metavar="JOB", help="Name of the job.")]


@job.command()
def start(
    plan: Annotated[
        Path, typer.Argument(help="A plan file; one that is not signed is signed if you type yes.")
    ],
    config: Config = SERVER_TOML,
    unchecked: Unchecked = False,
) -> None:
    """Queue the job of a plan; the running server starts it."""
    settings = load_config(config)
    text = read_text(plan, PlanError)
    made, signed = plan_from_json(text, plan)
    if signed is None:
        if not unchecked:
            require_tried(text, plan)
        console = Screen()
        print_lines(console, plan_lines(made), fold=True)
        confirm(
            console,
            "Type yes to sign this plan: ",
            unattended=PlanError(
                "a plan is not signed",
                file=plan,
                remedy="umbel-server plan sign, after you have read what it allows; or run this at"
                " a terminal",
            ),
            declined=UmbelError("the plan was not signed: nothing was changed", file=plan),
        )
        signed = sign_as_operator(settings, made, plan)
    key = read_identity(Path(settings.identity)).public_key
    open_signed(signed, PLAN_VERSIONS, key, "operator")
    if made.release_gate is not None:
        check_evaluation(settings.evaluation, made)
    _take_start(settings, plan, made)
    with _queue(config) as queue:
        queue.add(made.job, signed)
        roster = load_roster(settings).roster
        behind = sites_behind(queue, roster)
    say(f"queued: {made.job}")
    if behind:
        say(
            f"\nThese sites had not approved today's roster, {roster.digest().hex()},"
            f" when they last answered: {', '.join(behind)}.\nEach refuses the plan until it has:"
            " send it umbel-server roster export, for umbel-client roster approve.",
            err=True,
        )
    _tell_if_down(look(settings))


def _take_start(settings: ServerConfig, file: Path, plan: TrainingPlan) -> None:
    """Puts the tensor that a plan starts from into the registry, before the job is queued.

    Raises:
        StorageError: it is neither there nor beside the plan's file.
    """
    registry = Registry(Path(settings.state) / "registry")
    if isinstance(plan.start, LabelNamesStart) and not registry.folder(plan.start.tensor).exists():
        place = start_file(file, plan)
        assert place is not None  # such a start has a file
        registry.keep_start(plan, read_start(place, plan))
    if not isinstance(plan.start, SeedStart):
        registry.start(plan)


@job.command()
def stop(name: Name, config: Config = SERVER_TOML) -> None:
    """Stop a job: its releases stay, the current attempt is abandoned."""
    with _queue(config) as queue:
        queued = queue.ask_to_stop(name)
    state = "stopping" if queued.stop else queued.state.value
    say(f"{name}: {state}")


@job.command()
def resume(name: Name, config: Config = SERVER_TOML) -> None:
    """Resume a stopped or failed job after its last release."""
    settings = load_config(config)
    with _queue(config) as queue:
        say(f"{name}: {queue.resume(name).state.value}")
    _tell_if_down(look(settings))


@job.command()
def status(
    name: Annotated[
        str | None, typer.Argument(metavar="JOB", help="Name of a job; default: all.")
    ] = None,
    config: Config = SERVER_TOML,
    as_json: Json = False,
) -> None:
    """Show all jobs, or one job with the sites that it waits for and its figures."""
    settings = load_config(config)
    with _queue(config) as queue:
        jobs = queue.jobs() if name is None else [queue.job(name)]
        seen = {one.job: Seen(queue.answers(one.job), queue.times(one.job)) for one in jobs}
    found = {queued.job: _read_quality(config, queued.job) for queued in jobs}
    server = look(settings)
    if as_json:
        rows = [
            {**job_json(queued, seen[queued.job], server), **_quality_json(found[queued.job])}
            for queued in jobs
        ]
        print_json(rows if name is None else rows[0])
        return
    console = Screen()
    if name is not None:
        print_job(console, jobs[0], seen[name], server, settings.limits)
        if quality := _quality_lines(found[name]):
            console.print()
            print_lines(console, quality)
    elif not jobs:
        console.print("No job was started yet.")
    else:
        console.print(_job_table(jobs, seen))
    _tell_if_down(server)


@dataclass(frozen=True)
class _Quality:
    """What the journal says about a job's adapters."""

    evaluations: tuple[Evaluated, ...] = ()
    final_round: int | None = None
    counts: tuple[tuple[int, SiteCounts], ...] = ()
    """Round of an adapter, and the sites' counts on it."""


def _read_quality(config: Path, job: str) -> _Quality:
    path = Path(load_config(config).state) / "journal.sqlite"
    if not path.exists():
        return _Quality()
    with closing(Journal(path)) as journal:
        return _Quality(
            tuple(journal.evaluations(job)), journal.final_round(job), tuple(_counts(journal, job))
        )


def _counts(journal: Journal, job: str) -> Iterator[tuple[int, SiteCounts]]:
    for signed in journal.transcript(job):
        event = decode_canonical(signed.statement, Entry).event
        if isinstance(event, RoundReleased) and event.counts is not None:
            header = decode_canonical(event.header.statement, HEADER_VERSIONS)
            yield header.round - 1, event.counts


def _quality_json(quality: _Quality) -> dict[str, object]:
    return {
        "evaluations": [
            {**msgspec.to_builtins(one), "held_back": one.held_back} for one in quality.evaluations
        ],
        "final_round": quality.final_round,
        "counts": [
            {"round": number, **msgspec.to_builtins(counts)} for number, counts in quality.counts
        ],
    }


def _job_table(jobs: list[QueuedJob], seen: dict[str, Seen]) -> Table:
    rows = table("job", "state", "round", "stage", "answered", "refused", "changed")
    for queued in jobs:
        refused = [one.site for one in seen[queued.job].answers if one.refused]
        rows.add_row(
            queued.job,
            state_text(queued),
            str(queued.round),
            queued.stage,
            str(len(queued.answered)),
            str(len(refused)),
            local_time(queued.changed),
        )
    return rows


def _quality_lines(quality: _Quality) -> list[tuple[str, str]]:
    """Returns the scores of the last adapters, and which adapters were held back."""
    lines = []
    for one in quality.evaluations[-_SHOWN:]:
        lines.append((f"of round {one.round}", figures_text(one.evaluation)))
        if one.held_back:
            lines.append(("", f"held back: {one.gate}"))
    for number, counts in quality.counts[-_SHOWN:]:
        lines.append((f"of round {number}", f"{counts}, at the sites"))
    held = [str(one.round) for one in quality.evaluations[:-_SHOWN] if one.held_back]
    if held:
        lines.append(("held back", f"rounds {', '.join(held)}"))
    if quality.final_round is not None:
        lines.append(("last", f"the adapter of round {quality.final_round}"))
    return lines


def _tell_if_down(server: Server) -> None:
    """Says so where no server runs that would take the job up."""
    if server.running is False:
        say(NOT_RUNNING, err=True)


@contextmanager
def _queue(config: Path) -> Iterator[JobQueue]:
    queue = JobQueue(Path(load_config(config).state) / "queue.sqlite")
    try:
        yield queue
    finally:
        queue.close()
