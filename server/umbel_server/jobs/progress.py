"""The observer of a server's job: it writes progress to the log and to the queue."""

import logging
import time

from umbel_common.adapters.site_counts import SiteCounts
from umbel_common.adapters.vector import Vector
from umbel_common.errors import RemoteProtocolError, UmbelError
from umbel_common.plans.figures import Evaluation, GateResult, figures_text
from umbel_common.plans.statements import Release
from umbel_common.protocol.wire import Refusal, Reply
from umbel_common.secagg.unmasking import WrongShare
from umbel_server.jobs.exchange import WRONG_VERSION
from umbel_server.jobs.refusals import UNDECIDED
from umbel_server.messaging.link import Step
from umbel_server.storage.job_queue import JobQueue, SiteAnswer

_logger = logging.getLogger("umbel.rounds")


class ProgressObserver:
    """Writes a line to the log, and the row of the queue that `umbel-server job status` shows."""

    def __init__(self, queue: JobQueue, job: str) -> None:
        self._queue = queue
        self._job = job

    def on_asked(self, step: Step, sites: tuple[str, ...]) -> None:
        """See `Observer`."""
        self._queue.begin_stage(self._job, step.round, step.attempt, step.stage)

    def on_answered(self, step: Step, site: str, reply: Reply, received: int, sent: int) -> None:
        """See `Observer`."""
        refused = reply.check if isinstance(reply, Refusal) else ""
        answer = SiteAnswer(site, step.round, step.attempt, step.stage, refused, time.time())
        # A plan that people have not decided about is offered again and again, and refused.
        again = refused in UNDECIDED and any(
            (former.site, former.stage, former.refused) == (site, step.stage, refused)
            for former in self._queue.answers(self._job)
        )
        self._queue.add_answer(self._job, answer)
        if refused and not again:
            level = logging.INFO if refused in UNDECIDED else logging.WARNING
            _logger.log(level, "%s: %s refuses %s: %s", self._job, site, step, refused)

    def on_strayed(self, step: Step, site: str, error: RemoteProtocolError) -> None:
        """See `Observer`."""
        if error.check == WRONG_VERSION:
            text = f"{error.message}: {error.remedy}"
            _logger.error("%s: %s cannot take part: %s", self._job, site, text)
            return
        _logger.warning(
            "%s: a reply in the name of %s to %s: %s", self._job, site, step, error.check
        )

    def on_aborted(self, round_number: int, attempt: int, check: str) -> None:
        """See `Observer`."""
        _logger.warning(
            "%s: round %d, attempt %d is aborted: %s", self._job, round_number, attempt, check
        )

    def on_disputed(
        self, round_number: int, attempt: int, wrong_shares: tuple[WrongShare, ...]
    ) -> None:
        """See `Observer`."""
        _logger.warning(
            "%s: round %d, attempt %d reached its sum despite wrong shares: %s",
            self._job,
            round_number,
            attempt,
            ", ".join(map(str, wrong_shares)),
        )

    def on_counted(self, round_number: int, counts: SiteCounts, sites: int) -> None:
        """See `Observer`."""
        _logger.info(
            "%s: the adapter of round %d at %d sites: %s",
            self._job,
            round_number - 1,
            sites,
            counts,
        )

    def on_evaluated(
        self, round_number: int, evaluation: Evaluation, gate: GateResult | None
    ) -> None:
        """See `Observer`."""
        found = figures_text(evaluation)
        _logger.info("%s: round %d is evaluated: %s", self._job, round_number, found)
        if gate is not None and not gate.passed():
            _logger.warning("%s: round %d is held back: %s", self._job, round_number, gate)

    def on_unevaluated(self, round_number: int, error: UmbelError) -> None:
        """See `Observer`."""
        _logger.warning(
            "%s: round %d is not evaluated: %s", self._job, round_number, error.diagnostics()
        )

    def on_early_end(self, round_number: int, final: int) -> None:
        """See `Observer`."""
        _logger.info(
            "%s ends early after round %d: round %d stays the best",
            self._job,
            round_number,
            final,
        )

    def on_released(self, release: Release, adapter: Vector) -> None:
        """See `Observer`."""
        self._queue.end_round(self._job)
        _logger.info(
            "%s: round %d is released: %d sites, adapter %s",
            self._job,
            release.round,
            len(release.survivors),
            release.adapter.hex(),
        )
