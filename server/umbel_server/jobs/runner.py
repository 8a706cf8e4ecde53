"""Runs the jobs of an operator's queue, one after the other."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from pathlib import Path

from umbel_common.errors import JobFailed, UmbelError
from umbel_common.plans.plan import PLAN_VERSIONS
from umbel_common.plans.statements import Release
from umbel_common.trust.identity import Identity, Roster, open_signed
from umbel_common.trust.roster import RosterDocument
from umbel_common.trust.roster_file import document_from_json, document_to_json
from umbel_server.jobs.evaluator import ProcessEvaluator
from umbel_server.jobs.interfaces import Evaluator
from umbel_server.jobs.job import Job
from umbel_server.jobs.progress import ProgressObserver
from umbel_server.messaging.link import JobStopped, Link
from umbel_server.operator.config import EvaluationConfig, Limits
from umbel_server.storage.job_queue import JobQueue, JobState, QueuedJob
from umbel_server.storage.journal import Journal
from umbel_server.storage.registry import Registry

_MISTAKE = "a mistake of Umbel itself; the log has its details"
_logger = logging.getLogger("umbel.rounds")

Connect = Callable[[Callable[[], bool]], AbstractContextManager[Link]]
"""Opens a link to the sites; the link raises `JobStopped` as soon as its argument returns True."""


@dataclass(frozen=True)
class JobRunner:
    """Takes jobs from the queue and runs them."""

    state: Path
    """The operator's state folder."""
    operator: Identity
    queue: JobQueue
    read_roster: Callable[[], RosterDocument]
    """Reads the operator's roster; called for each job."""
    limits: Limits
    connect: Connect
    should_stop: Callable[[], bool]
    """Whether the process is to end; it resumes the current job at its next start."""
    read_evaluation: Callable[[], EvaluationConfig | None] = lambda: None
    """Reads how adapters are evaluated; called for each job."""

    def run_next(self) -> bool:
        """Runs the next job until it is over, stopped, or has to wait for people.

        Returns:
            whether the next call should follow at once.
        """
        queued = self.queue.next_job()
        if queued is None:
            return False
        if queued.stop:
            self.queue.set_state(queued.job, JobState.STOPPED)
            return True
        self.queue.set_state(queued.job, JobState.RUNNING)
        try:
            release = self._run(queued)
        except JobStopped:
            if self.should_stop():
                return False
            self.queue.set_state(queued.job, JobState.STOPPED)
            _logger.info("%s is stopped by the operator", queued.job)
        except UmbelError as error:
            if isinstance(error, JobFailed) and error.may_accept:
                # A plan may still be approved: the job waits, and is offered again.
                if error.diagnostics() != queued.detail:
                    _logger.warning("%s waits: %s", queued.job, error.diagnostics())
                self.queue.set_state(queued.job, JobState.WAITING, error.diagnostics())
                return False
            _logger.error("%s: %s", queued.job, error.diagnostics())
            self.queue.set_state(queued.job, JobState.FAILED, error.diagnostics())
        except Exception:
            # A mistake of ours ends the job that led to it, and not the process with the key.
            _logger.exception("%s: %s", queued.job, _MISTAKE)
            self.queue.set_state(queued.job, JobState.FAILED, _MISTAKE)
        else:
            self.queue.set_state(queued.job, JobState.FINISHED)
            _logger.info("%s is finished, with adapter %s", queued.job, release.adapter.hex())
        return True

    def _run(self, queued: QueuedJob) -> Release:
        plan = open_signed(queued.plan, PLAN_VERSIONS, self.operator.public_key, "operator")
        roster, revoked = self._parties(queued)

        def should_stop() -> bool:
            return self.should_stop() or self.queue.is_stop_wanted(queued.job)

        with (
            closing(Journal(self.state / "journal.sqlite")) as journal,
            self.connect(should_stop) as link,
        ):
            job = Job(
                plan,
                roster,
                self.operator,
                journal=journal,
                registry=Registry(self.state / "registry"),
                link=link,
                observer=ProgressObserver(self.queue, queued.job),
                limits=self.limits,
                revoked=revoked,
                evaluator=self._evaluator(should_stop),
            )
            return job.run()

    def _evaluator(self, should_stop: Callable[[], bool]) -> Evaluator | None:
        config = self.read_evaluation()
        if config is None:
            return None
        return ProcessEvaluator(config, self.state / "evaluation", should_stop)

    def _parties(self, queued: QueuedJob) -> tuple[Roster, frozenset[bytes]]:
        """Returns the roster that the job began with, and the keys that are no longer trusted.

        A site that joins later does not disturb the job. A site that has left since, or has another
        key, is sent nothing more.
        """
        today = self.read_roster()
        if queued.roster is None:
            self.queue.keep_roster(queued.job, document_to_json(today))
            return today.roster, today.revoked()
        begun = document_from_json(queued.roster, f"the roster of {queued.job}").roster
        gone = {*begun.members} - {*today.roster.members}
        return begun, today.revoked() | {member.public_key for member in gone}
