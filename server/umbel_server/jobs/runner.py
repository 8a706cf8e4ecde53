"""The jobs of an operator, worked off one after the other."""

from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from pathlib import Path

from umbel_common.errors import JobFailed, UmbelError
from umbel_common.plans.plan import TrainingPlan
from umbel_common.plans.statements import Release
from umbel_common.trust.identity import Identity, Roster, open_signed
from umbel_common.trust.roster import RosterDocument
from umbel_common.trust.roster_file import document_from_json, document_to_json
from umbel_server.jobs.evaluator import ProcessEvaluator
from umbel_server.jobs.interfaces import Evaluator
from umbel_server.jobs.job import Job
from umbel_server.jobs.progress import ProgressObserver, _logger
from umbel_server.messaging.link import JobStopped, Link
from umbel_server.operator.config import EvaluationConfig, Limits
from umbel_server.storage.job_queue import JobQueue, JobState, QueuedJob
from umbel_server.storage.journal import Journal
from umbel_server.storage.registry import Registry

Connect = Callable[[Callable[[], bool]], AbstractContextManager[Link]]
"""Opens a link to the sites, which gives up by `JobStopped` as soon as its argument says so."""


@dataclass(frozen=True)
class JobRunner:
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

    def run_next(self) -> bool:
        """Runs the next job until it is over, stopped, or has to wait for people.

        Returns:
            whether there is more to do at once.
        """
        queued = self.queue.next()
        if queued is None:
            return False
        if queued.stop:
            self.queue.set_state(queued.job, JobState.STOPPED)
            return True
        self.queue.set_state(queued.job, JobState.RUNNING)
        try:
            release = self._run(queued)
        except JobStopped:
            if self.stopping():
                return False
            self.queue.set_state(queued.job, JobState.STOPPED)
            _logger.info("%s is stopped by the operator", queued.job)
        except UmbelError as error:
            if isinstance(error, JobFailed) and error.may_accept:
                # People decide about plans in their own time.
                if error.diagnostics() != queued.detail:
                    _logger.warning("%s waits: %s", queued.job, error.diagnostics())
                self.queue.set_state(queued.job, JobState.WAITING, error.diagnostics())
                return False
            _logger.error("%s: %s", queued.job, error.diagnostics())
            self.queue.set_state(queued.job, JobState.FAILED, error.diagnostics())
        else:
            self.queue.set_state(queued.job, JobState.FINISHED)
            _logger.info("%s is finished, with adapter %s", queued.job, release.adapter.hex())
        return True

    def _run(self, queued: QueuedJob) -> Release:
        plan = open_signed(queued.plan, TrainingPlan, self.operator.public_key, "operator")
        roster, revoked = self._parties(queued)

        def stopped() -> bool:
            return self.stopping() or self.queue.stop_wanted(queued.job)

        with (
            closing(Journal(self.state / "journal.sqlite")) as store,
            self.connect(stopped) as link,
        ):
            job = Job(
                plan,
                roster,
                self.operator,
                store=store,
                registry=Registry(self.state / "registry"),
                link=link,
                observer=ProgressObserver(self.queue, queued.job),
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
