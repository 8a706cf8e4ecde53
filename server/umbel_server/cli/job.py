"""`umbel-server job`: start, stop, resume, status. The server need not be running."""

import time
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
from umbel_common.errors import PlanError
from umbel_common.plans.figures import figures_text
from umbel_common.plans.plan import TrainingPlan
from umbel_common.plans.plan_file import plan_from_json
from umbel_common.plans.statements import RoundHeader
from umbel_common.protocol.transcript import Entry, RoundReleased
from umbel_common.trust.identity import open_signed
from umbel_host.files.keys import read_identity
from umbel_host.files.text_file import read_text
from umbel_host.terminal import Screen, json_text, print_lines, say, table
from umbel_server.cli.options import SERVER_TOML, Config
from umbel_server.jobs.evaluator import check_evaluation
from umbel_server.operator.config import load_config
from umbel_server.storage.job_queue import JobQueue, QueuedJob
from umbel_server.storage.journal import Evaluated, Journal

job = typer.Typer(help="Jobs: start, stop, resume, status.", no_args_is_help=True)

_SHOWN = 5
"""Number of rounds whose figures are printed; `--json` has all of them."""
Name = Annotated[str, typer.Argument(metavar="JOB", help="Name of the job.")]


@job.command()
def start(
    plan: Annotated[Path, typer.Argument(help="A signed plan file.")],
    config: Config = SERVER_TOML,
) -> None:
    """Queue the job of a signed plan; the running server starts it."""
    settings = load_config(config)
    made, signed = plan_from_json(read_text(plan, PlanError), plan)
    if signed is None:
        raise PlanError(
            "a plan is not signed",
            file=plan,
            remedy="umbel-server plan sign, after you have read what it allows",
        )
    key = read_identity(Path(settings.identity)).public_key
    open_signed(signed, TrainingPlan, key, "operator")
    if made.release_gate is not None:
        check_evaluation(settings.evaluation, made)
    with _queue(config) as queue:
        queue.add(made.job, signed)
    say(f"queued: {made.job}")


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
    with _queue(config) as queue:
        say(f"{name}: {queue.resume(name).state.value}")


@job.command()
def status(
    name: Annotated[
        str | None, typer.Argument(metavar="JOB", help="Name of a job; default: all.")
    ] = None,
    config: Config = SERVER_TOML,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show all jobs, or one job with the sites that it waits for and its figures."""
    with _queue(config) as queue:
        jobs = queue.jobs() if name is None else [queue.job(name)]
    found = {queued.job: _read_quality(config, queued.job) for queued in jobs}
    if as_json:
        rows = [_public(queued, found[queued.job]) for queued in jobs]
        say(json_text(rows if name is None else rows[0]))
        return
    console = Screen()
    if name is not None:
        print_lines(console, _details(jobs[0], found[name]))
    elif not jobs:
        console.print("No job was started yet.")
    else:
        console.print(_job_table(jobs), soft_wrap=True)


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
            header = decode_canonical(event.header.statement, RoundHeader)
            yield header.round - 1, event.counts


def _public(queued: QueuedJob, quality: _Quality) -> dict[str, object]:
    parts: dict[str, object] = msgspec.to_builtins(queued)
    del parts["plan"]
    parts["evaluations"] = [
        {**msgspec.to_builtins(one), "held_back": one.held_back} for one in quality.evaluations
    ]
    parts["final_round"] = quality.final_round
    parts["counts"] = [
        {"round": number, **msgspec.to_builtins(counts)} for number, counts in quality.counts
    ]
    return parts


def _job_table(jobs: list[QueuedJob]) -> Table:
    rows = table("job", "state", "round", "stage", "answered")
    for queued in jobs:
        rows.add_row(
            queued.job, _state(queued), str(queued.round), queued.stage, str(len(queued.answered))
        )
    return rows


def _details(queued: QueuedJob, quality: _Quality) -> list[tuple[str, str]]:
    moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(queued.changed))
    lines = [("job", queued.job), ("state", _state(queued)), ("changed", moment)]
    if queued.stage:
        lines.append(("round", f"{queued.round}, attempt {queued.attempt}, {queued.stage}"))
        lines.append(("answered", ", ".join(queued.answered) or "nobody yet"))
    if queued.detail:
        lines.append(("why", queued.detail))
    return [*lines, *_quality_lines(quality)]


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


def _state(queued: QueuedJob) -> str:
    return f"{queued.state.value}, stopping" if queued.stop else queued.state.value


@contextmanager
def _queue(config: Path) -> Iterator[JobQueue]:
    queue = JobQueue(Path(load_config(config).state) / "queue.sqlite")
    try:
        yield queue
    finally:
        queue.close()
