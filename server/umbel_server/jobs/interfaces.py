"""What a job needs besides a link to its sites: an observer of events, and an evaluator."""

from typing import Protocol

from umbel_common.adapters.site_counts import SiteCounts
from umbel_common.adapters.vector import Vector
from umbel_common.errors import RemoteProtocolError, UmbelError
from umbel_common.plans.figures import Evaluation, GateResult
from umbel_common.plans.plan import TrainingPlan
from umbel_common.plans.statements import Release
from umbel_common.protocol.wire import Reply
from umbel_common.secagg.unmasking import WrongShare
from umbel_server.messaging.link import Step


class Observer(Protocol):
    """Learns what happens in a job, for logs, dashboards and live views."""

    def on_asked(self, step: Step, sites: tuple[str, ...]) -> None:
        """A step begins: its requests are about to be sent to these sites."""
        ...

    def on_answered(self, step: Step, site: str, reply: Reply, received: int, sent: int) -> None:
        """A site's reply was opened.

        Args:
            received: bytes of the sealed request, which the site received.
            sent: bytes of the sealed reply, which the site sent.
        """
        ...

    def on_strayed(self, step: Step, site: str, error: RemoteProtocolError) -> None:
        """A message came in a site's name that is not its reply to the request."""
        ...

    def on_aborted(self, round_number: int, attempt: int, check: str) -> None:
        """An attempt released nothing."""
        ...

    def on_disputed(
        self, round_number: int, attempt: int, wrong_shares: tuple[WrongShare, ...]
    ) -> None:
        """An attempt reached its sum although some site lied about its shares."""
        ...

    def on_released(self, release: Release, adapter: Vector) -> None:
        """A round's release is on disk and in the transcript."""
        ...

    def on_counted(self, round_number: int, counts: SiteCounts, sites: int) -> None:
        """The sites scored the adapter that a round started from on their held-out records.

        Args:
            counts: the sum over all sites.
            sites: how many sites are in the sum.
        """
        ...

    def on_evaluated(
        self, round_number: int, evaluation: Evaluation, gate: GateResult | None
    ) -> None:
        """A round's adapter was scored. If the gate held it back, the round's release names the
        adapter before it."""
        ...

    def on_unevaluated(self, round_number: int, error: UmbelError) -> None:
        """An adapter that was released could not be scored."""
        ...

    def on_early_end(self, round_number: int, final: int) -> None:
        """The job ends after this round, with the release of round `final` as its last."""
        ...


class Evaluator(Protocol):
    """Scores adapters on public records."""

    stop_after: int | None
    """Rounds without a lower loss after which a job ends early; None: never."""

    def check(self, plan: TrainingPlan) -> None:
        """Refuses a plan whose adapters it cannot score; called before the job starts.

        Raises:
            ConfigError, DataError: something is missing; or the holdout is not the one that the
                plan's release gate names.
        """
        ...

    def evaluate(self, plan: TrainingPlan, adapter: Vector, before: Vector | None) -> Evaluation:
        """Scores an adapter, float32[plan.lora.size].

        Args:
            before: the adapter that it came from, for the drift; None for the first one.

        Raises:
            UmbelError: the evaluation failed.
            JobStopped: the job is to be stopped.
        """
        ...
