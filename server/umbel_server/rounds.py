"""The jobs of an operator, worked off one after the other."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from pathlib import Path

from umbel_common.adapter import Vector
from umbel_common.errors import JobFailed, RemoteProtocolError, UmbelError
from umbel_common.evaluation import Evaluation, GateResult, figures_text
from umbel_common.identity import Identity, Roster, open_signed
from umbel_common.plan import TrainingPlan
from umbel_common.roster_document import RosterDocument
from umbel_common.roster_file import document_from_json, document_to_json
from umbel_common.secagg.unmasking import WrongShare
from umbel_common.site_counts import SiteCounts
from umbel_common.statements import Release
from umbel_common.wire import Refusal, Reply
from umbel_server.config import EvaluationConfig
from umbel_server.evaluator import ProcessEvaluator
from umbel_server.exchange import WRONG_VERSION
from umbel_server.job import UNDECIDED, Job
from umbel_server.ports import Evaluator, JobStopped, Limits, Link, Step
from umbel_server.queue import JobQueue, QueuedJob, State
from umbel_server.registry import Registry
from umbel_server.store import Store

_logger = logging.getLogger("umbel.rounds")

Connect = Callable[[Callable[[], bool]], AbstractContextManager[Link]]
"""Opens a link to the sites, which gives up by `JobStopped` as soon as its argument says so."""


class Progress:
    """The job's observer: a line in the log, and the queue's row for `umbel-server job status`."""

    def __init__(self, queue: JobQueue, job: str) -> None:
        self._queue = queue
        self._job = job
        self._step: Step | None = None
        self._answered: list[str] = []

    def answered(self, step: Step, site: str, reply: Reply, received: int, sent: int) -> None:
        """See `Observer`."""
        if step != self._step:
            self._step, self._answered = step, []
        if isinstance(reply, Refusal):
            level = logging.INFO if reply.check in UNDECIDED else logging.WARNING
            _logger.log(level, "%s: %s refuses %s: %s", self._job, site, step, reply.check)
            return
        self._answered.append(site)
        self._queue.set_progress(
            self._job,
            round_number=step.round,
            attempt=step.attempt,
            stage=step.stage,
            answered=tuple(self._answered),
        )

    def strayed(self, step: Step, site: str, error: RemoteProtocolError) -> None:
        """See `Observer`."""
        if error.check == WRONG_VERSION:
            text = f"{error.message}: {error.remedy}"
            _logger.error("%s: no work with %s: %s", self._job, site, text)
            return
        _logger.warning(
            "%s: a reply in the name of %s to %s: %s", self._job, site, step, error.check
        )

    def aborted(self, round_number: int, attempt: int, check: str) -> None:
        """See `Observer`."""
        _logger.warning(
            "%s: round %d, attempt %d is aborted: %s", self._job, round_number, attempt, check
        )

    def disputed(
        self, round_number: int, attempt: int, wrong_shares: tuple[WrongShare, ...]
    ) -> None:
        """See `Observer`."""
        _logger.warning(
            "%s: round %d, attempt %d has its sum in spite of wrong shares: %s",
            self._job,
            round_number,
            attempt,
            ", ".join(map(str, wrong_shares)),
        )

    def counted(self, round_number: int, counts: SiteCounts, sites: int) -> None:
        """See `Observer`."""
        _logger.info(
            "%s: the adapter of round %d at %d sites: %s",
            self._job,
            round_number - 1,
            sites,
            counts,
        )

    def evaluated(self, round_number: int, evaluation: Evaluation, gate: GateResult | None) -> None:
        """See `Observer`."""
        found = figures_text(evaluation)
        _logger.info("%s: round %d is evaluated: %s", self._job, round_number, found)
        if gate is not None and not gate.passed():
            _logger.warning("%s: round %d is held back: %s", self._job, round_number, gate)

    def unevaluated(self, round_number: int, error: UmbelError) -> None:
        """See `Observer`."""
        _logger.warning(
            "%s: round %d is not evaluated: %s", self._job, round_number, error.diagnostics()
        )

    def ends_early(self, round_number: int, final: int) -> None:
        """See `Observer`."""
        _logger.info(
            "%s ends early after round %d: round %d stays the best",
            self._job,
            round_number,
            final,
        )

    def released(self, release: Release, adapter: Vector) -> None:
        """See `Observer`."""
        _logger.info(
            "%s: round %d is released: %d sites, adapter %s",
            self._job,
            release.round,
            len(release.survivors),
            release.adapter.hex(),
        )


@dataclass(frozen=True)
class Rounds:
    """What works off the queue."""

    state: Path
    """The operator's state folder."""
    operator: Identity
    queue: JobQueue
    roster: Callable[[], RosterDocument]
    """Read anew for each job."""
    limits: Limits
    connect: Connect
    stopping: Callable[[], bool]
    """Whether the process is to end; the job under way goes on at its next start."""
    evaluation: Callable[[], EvaluationConfig | None] = lambda: None
    """Read anew for each job."""

    def work(self) -> bool:
        """Runs the next job until it is over, stopped, or has to wait for people.

        Returns:
            whether there is more to do at once.
        """
        queued = self.queue.next()
        if queued is None:
            return False
        if queued.stop:
            self.queue.set_state(queued.job, State.STOPPED)
            return True
        self.queue.set_state(queued.job, State.RUNNING)
        try:
            release = self._run(queued)
        except JobStopped:
            if self.stopping():
                return False
            self.queue.set_state(queued.job, State.STOPPED)
            _logger.info("%s is stopped by the operator", queued.job)
        except UmbelError as error:
            if isinstance(error, JobFailed) and error.may_accept:
                # People decide about plans in their own time.
                if error.diagnostics() != queued.detail:
                    _logger.warning("%s waits: %s", queued.job, error.diagnostics())
                self.queue.set_state(queued.job, State.WAITING, error.diagnostics())
                return False
            _logger.error("%s: %s", queued.job, error.diagnostics())
            self.queue.set_state(queued.job, State.FAILED, error.diagnostics())
        else:
            self.queue.set_state(queued.job, State.FINISHED)
            _logger.info("%s is finished, with adapter %s", queued.job, release.adapter.hex())
        return True

    def _run(self, queued: QueuedJob) -> Release:
        plan = open_signed(queued.plan, TrainingPlan, self.operator.public_key, "operator")
        roster, revoked = self._parties(queued)

        def stopped() -> bool:
            return self.stopping() or self.queue.stop_wanted(queued.job)

        with (
            closing(Store(self.state / "journal.sqlite")) as store,
            self.connect(stopped) as link,
        ):
            job = Job(
                plan,
                roster,
                self.operator,
                store=store,
                registry=Registry(self.state / "registry"),
                link=link,
                observer=Progress(self.queue, queued.job),
                limits=self.limits,
                revoked=revoked,
                evaluator=self._evaluator(stopped),
            )
            return job.run()

    def _evaluator(self, stopped: Callable[[], bool]) -> Evaluator | None:
        config = self.evaluation()
        if config is None:
            return None
        return ProcessEvaluator(config, self.state / "evaluation", stopped)

    def _parties(self, queued: QueuedJob) -> tuple[Roster, frozenset[bytes]]:
        """The roster that the job began with, and the keys in it that do not count any more.

        A site that joins later does not disturb the job; one that left since, or has another key,
        is asked for nothing more.
        """
        today = self.roster()
        if queued.roster is None:
            self.queue.keep_roster(queued.job, document_to_json(today))
            return today.roster, today.revoked()
        begun = document_from_json(queued.roster, f"the roster of {queued.job}").roster
        gone = {*begun.members} - {*today.roster.members}
        return begun, today.revoked() | {member.public_key for member in gone}
