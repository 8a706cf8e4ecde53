"""A job as its operator sees it: how far it is, which site answered what, and when."""

import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec
from rich.console import Console

from umbel_common.canonical import decode_canonical
from umbel_common.errors import UnreachableError
from umbel_common.plans.plan import PLAN_VERSIONS, TrainingPlan
from umbel_common.printable import one_line
from umbel_common.trust.identity import Roster
from umbel_common.trust.roster_file import document_from_json
from umbel_host.terminal import duration, json_time, local_time, print_lines, table
from umbel_server.operator.config import Limits, ServerConfig, carrier_socket, rounds_socket
from umbel_server.storage.job_queue import JobQueue, JobState, QueuedJob, SiteAnswer, Times

if TYPE_CHECKING:
    from umbel_server.messaging.carrier import Contact

NOT_RUNNING = "No server is running, so no job makes progress: umbel-server run"
_ASK_SECONDS = 2.0
_RECENT_SECONDS = 60.0
"""Time since two clients used one site's keys, after which `job status` says WAS instead of IS."""
_AFTER_THE_ROSTER = frozenset(
    {"awaiting-approval", "site-paused", "site-not-ready", "too-many-waiting", "budget"}
)
"""Refusals of a site that has approved the job's roster: it is asked about first."""


@dataclass(frozen=True)
class Seen:
    """What the queue knows of a running job's sites and times."""

    answers: tuple[SiteAnswer, ...]
    times: Times


@dataclass(frozen=True)
class Server:
    """What the running server says now."""

    running: bool | None
    """None: this user may not ask."""
    contacts: "dict[str, Contact]" = field(default_factory=dict)
    """What the process with the port saw of each site since it started."""


def look(settings: ServerConfig) -> Server:
    """Asks the two processes of the server, which need not be running."""
    socket = rounds_socket(settings)
    # gRPC waits for a socket that is not there, and takes a while to load.
    try:
        socket.stat()
    except FileNotFoundError:
        return Server(running=False)
    except PermissionError:
        return Server(running=None)
    if not os.access(socket, os.W_OK):
        return Server(running=None)
    from umbel_host.transport.sockets import is_healthy
    from umbel_server.messaging.carrier import read_contacts

    try:
        is_healthy(socket, _ASK_SECONDS)
    except UnreachableError:
        return Server(running=False)
    try:
        return Server(True, read_contacts(carrier_socket(settings), _ASK_SECONDS))
    except UnreachableError:
        return Server(running=True)


def sites_behind(queue: JobQueue, today: Roster) -> list[str]:
    """The sites whose last known roster is not today's, by what they last answered."""
    last: dict[str, tuple[float, bool]] = {}
    for job in queue.jobs():
        begun = _roster_of(job)
        for answer in queue.answers(job.job):
            known = not answer.refused or answer.refused in _AFTER_THE_ROSTER
            if begun is None or not (known or answer.refused == "roster-digest"):
                continue
            has_it = known and begun.digest() == today.digest()
            last[answer.site] = max(last.get(answer.site, (0.0, True)), (answer.time, has_it))
    return [one.name for one in today.members if not last.get(one.name, (0.0, True))[1]]


def state_text(queued: QueuedJob) -> str:
    """The state of a job, for people."""
    return f"{queued.state.value}, stopping" if queued.stop else queued.state.value


def print_job(
    console: Console, queued: QueuedJob, seen: Seen, server: Server, limits: Limits
) -> None:
    """Prints how far a job is, and a line for each of its sites."""
    now = time.time()
    lines = [("job", queued.job), ("state", state_text(queued))]
    lines.append(("changed", local_time(queued.changed)))
    if queued.stage:
        name = "round" if queued.round else "stage"
        lines.append((name, _stage_text(queued, seen.times, limits, now)))
        lines.append(("answered", ", ".join(queued.answered) or "nobody yet"))
    left = seconds_left(queued, seen.times, now)
    if left is not None:
        each = duration(seen.times.round_seconds)
        lines.append(("estimate", f"about {duration(left)} left, at {each} a round"))
    for number, line in enumerate(queued.detail.splitlines()):
        lines.append(("" if number else "why", line))
    print_lines(console, lines)
    sites = _sites(queued, seen)
    if not sites:
        return
    answers = {answer.site: answer for answer in seen.answers}
    rows = table("site", "last answer", "at", "last contact", folding=("site",))
    for site in sites:
        rows.add_row(site, *_answer_text(answers.get(site)), _contact_text(server, site, now))
    console.print()
    console.print(rows)
    for site in sites:
        contact = server.contacts.get(site)
        if contact is not None and contact.twice is not None:
            was = "IS" if now - contact.twice < _RECENT_SECONDS else "WAS"
            places = one_line(" and ".join(contact.places))
            console.print(
                f"\n{site} {was} CONNECTED TWICE, from {places}, last"
                f" seen {local_time(contact.twice)}: two clients have its keys. Its people should"
                " find both, and stop one of them for good.",
                soft_wrap=True,
            )


def job_json(queued: QueuedJob, seen: Seen, server: Server) -> dict[str, object]:
    """A job as a document for programs."""
    parts: dict[str, object] = msgspec.to_builtins(queued)
    del parts["plan"]
    answers, sites = {answer.site: answer for answer in seen.answers}, _sites(queued, seen)
    return {
        **parts,
        "roster": None if queued.roster is None else msgspec.Raw(queued.roster.encode()),
        "changed": json_time(queued.changed),
        "rounds": _plan_of(queued).training.rounds,
        "stage_began": json_time(seen.times.stage_began or None),
        "round_began": json_time(seen.times.round_began or None),
        "round_seconds": seen.times.round_seconds or None,
        "left_seconds": seconds_left(queued, seen.times, time.time()),
        "server_running": server.running,
        "sites": [_site_json(site, answers.get(site), server.contacts.get(site)) for site in sites],
    }


def seconds_left(queued: QueuedJob, times: Times, now: float) -> float | None:
    """About how long a running job will take; None before its first release, after its last, or if
    it rests."""
    runs = queued.state is JobState.RUNNING and queued.stage != "finish"
    if not runs or not queued.round or not times.round_seconds:
        return None
    rounds = _plan_of(queued).training.rounds - queued.round + 1
    return max(rounds * times.round_seconds - (now - times.round_began), 0.0)


def _site_json(
    site: str, answer: SiteAnswer | None, contact: "Contact | None"
) -> dict[str, object]:
    return {
        "site": site,
        "round": None if answer is None else answer.round,
        "attempt": None if answer is None else answer.attempt,
        "stage": None if answer is None else answer.stage,
        "refused": None if answer is None else answer.refused or None,
        "answered_at": None if answer is None else json_time(answer.time),
        "last_contact": None if contact is None else json_time(contact.last),
        "connected_twice": None if contact is None else json_time(contact.twice),
    }


def _stage_text(queued: QueuedJob, times: Times, limits: Limits, now: float) -> str:
    steps = [queued.stage]
    if queued.attempt:
        steps.insert(0, f"attempt {queued.attempt}")
    if queued.round:
        steps.insert(0, f"{queued.round} of {_plan_of(queued).training.rounds}")
    text = ", ".join(steps)
    if queued.state is JobState.RUNNING and times.stage_began:
        most = duration(limits.seconds(queued.stage))
        text += f", for {duration(now - times.stage_began)} of at most {most}"
    return text


def _answer_text(answer: SiteAnswer | None) -> tuple[str, str]:
    if answer is None:
        return "none yet", ""
    step = answer.stage if not answer.round else f"{answer.stage} of round {answer.round}"
    said = f"refused {step}: {answer.refused}" if answer.refused else step
    return said, local_time(answer.time)


def _contact_text(server: Server, site: str, now: float) -> str:
    contact = server.contacts.get(site)
    if contact is not None:
        return f"{duration(now - contact.last)} ago"
    return "none since the server started" if server.running else "unknown"


def _sites(queued: QueuedJob, seen: Seen) -> list[str]:
    roster = _roster_of(queued)
    members = () if roster is None else tuple(member.name for member in roster.members)
    return sorted({*members, *(answer.site for answer in seen.answers)})


def _roster_of(queued: QueuedJob) -> Roster | None:
    """The roster that a job began with; None before its start."""
    if queued.roster is None:
        return None
    return document_from_json(queued.roster, f"the roster of {queued.job}").roster


def _plan_of(queued: QueuedJob) -> TrainingPlan:
    return decode_canonical(queued.plan.statement, PLAN_VERSIONS)
