"""What a job is given by whoever runs it: a link to the sites, an observer, and limits."""

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
    """Is told what happens, for logs, dashboards and live views."""

    def answered(self, step: Step, site: str, reply: Reply, received: int, sent: int) -> None:
        """A site's reply was opened; sizes of the sealed request and reply in bytes, as the site
        counts them."""
        ...

    def strayed(self, step: Step, site: str, error: RemoteProtocolError) -> None:
        """Something came in a site's name that is no reply of this site to what it was asked."""
        ...

    def aborted(self, round_number: int, attempt: int, check: str) -> None:
        """An attempt released nothing."""
        ...

    def disputed(
        self, round_number: int, attempt: int, wrong_shares: tuple[WrongShare, ...]
    ) -> None:
        """An attempt reached its sum although some site lied about its shares."""
        ...

    def released(self, release: Release, adapter: Vector) -> None:
        """A round's release is on disk and in the transcript."""
        ...

    def counted(self, round_number: int, counts: SiteCounts, sites: int) -> None:
        """So many sites counted, together, how the adapter that a round started from does on
        records that they hold out."""
        ...

    def evaluated(self, round_number: int, evaluation: Evaluation, gate: GateResult | None) -> None:
        """A round's adapter was scored, and perhaps held back: then its release names the adapter
        before."""
        ...

    def unevaluated(self, round_number: int, error: UmbelError) -> None:
        """An adapter that was released could not be scored."""
        ...

    def ends_early(self, round_number: int, final: int) -> None:
        """After this round the job ends, with the release of round `final` as its last."""
        ...


class Evaluator(Protocol):
    """Scores adapters on public records."""

    stop_after: int | None
    """Rounds without a lower loss after which a job ends early; None: never."""

    def check(self, plan: TrainingPlan) -> None:
        """Refuses what it cannot do, before anything of a job is done.

        Raises:
            ConfigError, DataError: what is missing; or the holdout is not the one that the plan's
                release gate names.
        """
        ...

    def evaluate(self, plan: TrainingPlan, adapter: Vector, before: Vector | None) -> Evaluation:
        """Scores an adapter, float32[plan.lora.size].

        Args:
            before: the one that it came from, for the drift.

        Raises:
            UmbelError: it failed, for whatever reason.
            JobStopped: the job is to be stopped.
        """
        ...
