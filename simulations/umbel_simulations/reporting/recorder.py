"""Turns the reports of server and sites into events, for the live view and `metrics.jsonl`."""

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from umbel_client.site.ipc import SharedEpsilon
from umbel_common.adapters.site_counts import SiteCounts
from umbel_common.adapters.vector import Vector
from umbel_common.errors import RemoteProtocolError, UmbelError
from umbel_common.plans.figures import Evaluation, GateResult
from umbel_common.plans.statements import Release
from umbel_common.protocol.wire import (
    ConfirmReply,
    FillReply,
    FinishReply,
    MaskReply,
    OfferReply,
    PrepareReply,
    Refusal,
    Reply,
    ShareReply,
    TogetherReply,
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
    PrepareReply,
    FillReply,
    TogetherReply,
    FinishReply,
    Refusal,
)
"""Kinds of replies that were reviewed and hold no model or data value in clear. Any other kind
counts as clear until it is reviewed."""


OnEvent = Callable[[events.AnyEvent], None]


class Recorder:
    """Collects a run's events. Any thread may call it."""

    def __init__(self, metrics: Path, on_event: OnEvent) -> None:
        """Args:
        metrics: file to which events are appended, one JSON object a line.
        on_event: called with each event, such as by the live view.
        """
        self._began = time.monotonic()
        self._file = metrics.open("ab")
        self._on_event = on_event
        self._lock = threading.Lock()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def seconds(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self._began

    def emit(self, event: events.AnyEvent) -> None:
        """Passes an event on, and keeps it unless it only reports progress."""
        with self._lock:
            self._on_event(event)
            if not isinstance(event, events.SiteStep | events.Preparing | events.BaselineStep):
                self._file.write(msgspec.json.encode(event) + b"\n")
                self._file.flush()


class Stopped(BaseException):
    """Ends the work of a site's thread when the run is interrupted.

    It is not an `Exception`, so no code handles it as an error.
    """


class SiteObserver:
    """`umbel_client.trainer.observer.Observer` of one simulated site."""

    def __init__(self, site: str, recorder: Recorder, stop: threading.Event) -> None:
        self._site = site
        self._recorder = recorder
        self._stop = stop
        self.epsilon: float | None = None
        self.shared: SharedEpsilon | None = None
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

    def charged(
        self,
        round_number: int,
        epsilon: float | None,
        *,
        again: bool,
        shared: SharedEpsilon | None = None,
    ) -> None:
        """See `Observer`."""
        self.epsilon, self.shared = epsilon, shared

    def step(self, round_number: int, step: int, steps: int, records: float) -> None:
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

    def finished(self, job: str, adapter: Path) -> None:
        """See `Observer`."""

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
        score_adapter: Callable[[Vector], Score],
    ) -> None:
        """Args:
        score_adapter: scores a released adapter on the held-out public set.
        """
        self._recorder = recorder
        self._sites = sites
        self._score_adapter = score_adapter

    def on_asked(self, step: Step, sites: tuple[str, ...]) -> None:
        """See `Observer`."""

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
        """See `Observer`. No message goes astray in one process."""

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
        """See `Observer`."""
        self._recorder.emit(
            events.SitesCounted(
                seconds=self._recorder.seconds(), round=round_number, text=str(counts)
            )
        )

    def on_evaluated(
        self, round_number: int, evaluation: Evaluation, gate: GateResult | None
    ) -> None:
        """See `Observer`. The judge scores each release; here the release gate is asked."""
        if gate is not None:
            self._recorder.emit(
                events.Gated(
                    seconds=self._recorder.seconds(),
                    round=round_number,
                    before=gate.before,
                    after=gate.after,
                    passed=gate.passed(),
                )
            )

    def on_unevaluated(self, round_number: int, error: UmbelError) -> None:
        """See `Observer`."""

    def on_early_end(self, round_number: int, final: int) -> None:
        """See `Observer`."""

    def on_released(self, release: Release, adapter: Vector) -> None:
        """See `Observer`."""
        self._recorder.emit(
            events.RoundReleased(
                seconds=self._recorder.seconds(),
                round=release.round,
                attempt=release.attempt,
                survivors=list(release.survivors),
                epsilon={site: observer.epsilon for site, observer in self._sites.items()},
                score=self._score_adapter(adapter),
                shared={
                    site: observer.shared.epsilon
                    for site, observer in self._sites.items()
                    if observer.shared is not None
                },
            )
        )


def read_metrics(path: Path) -> list[events.AnyEvent]:
    """Every event that was kept, including those from before a run was resumed."""
    return [_event(line) for line in path.read_bytes().splitlines()]


def _event(line: bytes) -> events.AnyEvent:
    fields = msgspec.json.decode(line)
    if fields["event"] == "round-released" and "score" not in fields:
        # Version 0.1 wrote the fields of the score beside those of the event. A run that it began
        # can still be resumed.
        known = [name for name in Score.__struct_fields__ if name in fields]
        fields["score"] = {name: fields.pop(name) for name in known}
    event: events.AnyEvent = msgspec.convert(fields, events.AnyEvent)
    return event
