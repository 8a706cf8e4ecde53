"""Turns what server and sites report into events: to the live view, and to `metrics.jsonl`."""

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from umbel_common.adapters.site_counts import SiteCounts
from umbel_common.adapters.vector import Vector
from umbel_common.errors import RemoteProtocolError, UmbelError
from umbel_common.plans.figures import Evaluation, GateResult
from umbel_common.plans.statements import Release
from umbel_common.protocol.wire import (
    ConfirmReply,
    FinishReply,
    MaskReply,
    OfferReply,
    Refusal,
    Reply,
    ShareReply,
    TrainReply,
    UnmaskReply,
)
from umbel_common.secagg.unmasking import WrongShare
from umbel_server.messaging.link import Step
from umbel_simulations.reporting import events
from umbel_simulations.reporting.results import Score

WITHOUT_CLEAR_VALUES = (
    OfferReply,
    TrainReply,
    ShareReply,
    MaskReply,
    ConfirmReply,
    UnmaskReply,
    FinishReply,
    Refusal,
)
"""Replies that were looked through and hold no model or data value in clear; any other counts as
clear until somebody has looked."""


class Recorder:
    """Collects a run's events; safe to call from any thread."""

    def __init__(self, metrics: Path, show: Callable[[events.AnyEvent], None]) -> None:
        """Args:
        metrics: the file that events are appended to, one JSON object a line.
        show: the live view.
        """
        self._began = time.monotonic()
        self._file = metrics.open("ab")
        self._show = show
        self._lock = threading.Lock()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def seconds(self) -> float:
        """Since the run began."""
        return time.monotonic() - self._began

    def emit(self, event: events.AnyEvent) -> None:
        """Shows an event; keeps it unless it is mere progress."""
        with self._lock:
            self._show(event)
            if not isinstance(event, events.SiteStep | events.Preparing | events.BaselineStep):
                self._file.write(msgspec.json.encode(event) + b"\n")
                self._file.flush()


class Stopped(BaseException):
    """Ends the work of a site's thread when the run is interrupted; no error, so nobody handles it
    as one."""


class SiteObserver:
    """`umbel_client.trainer.observer.Observer` of one simulated site."""

    def __init__(self, site: str, recorder: Recorder, stop: threading.Event) -> None:
        self._site = site
        self._recorder = recorder
        self._stop = stop
        self.epsilon: float | None = None
        self.errors: list[UmbelError] = []

    def preparing(self, what: str, done: int, total: int) -> None:
        """See `Observer`."""
        self._check_stop()
        self._recorder.emit(
            events.Preparing(
                seconds=self._recorder.seconds(),
                what=what,
                site=self._site,
                done=done,
                total=total,
            )
        )

    def charged(self, round_number: int, epsilon: float | None) -> None:
        """See `Observer`."""
        self.epsilon = epsilon

    def step(self, round_number: int, step: int, steps: int) -> None:
        """See `Observer`."""
        self._check_stop()
        self._recorder.emit(
            events.SiteStep(
                seconds=self._recorder.seconds(),
                site=self._site,
                round=round_number,
                step=step,
                steps=steps,
            )
        )

    def refused(self, error: UmbelError) -> None:
        """See `Observer`."""
        self.errors.append(error)

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise Stopped


class ServerObserver:
    """`umbel_server.jobs.job.Observer` of a simulated server."""

    def __init__(
        self,
        recorder: Recorder,
        sites: Mapping[str, SiteObserver],
        score: Callable[[Vector], Score],
    ) -> None:
        """Args:
        score: judges an adapter on the held-out public set.
        """
        self._recorder = recorder
        self._sites = sites
        self._score = score

    def on_answered(self, step: Step, site: str, reply: Reply, received: int, sent: int) -> None:
        """See `Observer`."""
        self._recorder.emit(
            events.SiteStage(
                seconds=self._recorder.seconds(),
                site=site,
                round=step.round,
                attempt=step.attempt,
                stage=step.stage,
                refusal=reply.check if isinstance(reply, Refusal) else None,
                sent_bytes=sent,
                masked_bytes=len(reply.vector) if isinstance(reply, MaskReply) else 0,
                clear_bytes=0 if isinstance(reply, WITHOUT_CLEAR_VALUES) else sent,
                received_bytes=received,
            )
        )

    def on_strayed(self, step: Step, site: str, error: RemoteProtocolError) -> None:
        """See `Observer`. Nothing strays in one process."""

    def on_aborted(self, round_number: int, attempt: int, check: str) -> None:
        """See `Observer`."""
        self._recorder.emit(
            events.AttemptAborted(
                seconds=self._recorder.seconds(), round=round_number, attempt=attempt, check=check
            )
        )

    def on_disputed(
        self, round_number: int, attempt: int, wrong_shares: tuple[WrongShare, ...]
    ) -> None:
        """See `Observer`."""
        self._recorder.emit(
            events.SharesDisputed(
                seconds=self._recorder.seconds(),
                round=round_number,
                attempt=attempt,
                pairs=[(share.owner, share.site) for share in wrong_shares],
            )
        )

    def on_counted(self, round_number: int, counts: SiteCounts, sites: int) -> None:
        """See `Observer`. No scenario has a federated evaluation."""

    def on_evaluated(
        self, round_number: int, evaluation: Evaluation, gate: GateResult | None
    ) -> None:
        """See `Observer`. Here the judge scores each release, and no plan has a release gate."""

    def on_unevaluated(self, round_number: int, error: UmbelError) -> None:
        """See `Observer`."""

    def on_early_end(self, round_number: int, final: int) -> None:
        """See `Observer`."""

    def on_released(self, release: Release, adapter: Vector) -> None:
        """See `Observer`."""
        score = self._score(adapter)
        self._recorder.emit(
            events.RoundReleased(
                seconds=self._recorder.seconds(),
                round=release.round,
                attempt=release.attempt,
                survivors=list(release.survivors),
                accuracy=score.accuracy,
                macro_f1=score.macro_f1,
                perplexity=score.perplexity,
                perplexity_error=score.perplexity_error,
                general_perplexity=score.general_perplexity,
                epsilon={site: observer.epsilon for site, observer in self._sites.items()},
            )
        )


def read_metrics(path: Path) -> list[events.AnyEvent]:
    """Every event that was kept, also of earlier parts of a run that was resumed."""
    return [
        msgspec.json.decode(line, type=events.AnyEvent) for line in path.read_bytes().splitlines()
    ]
