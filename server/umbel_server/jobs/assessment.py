"""What the adapters of a job are worth, round after round: figures, release gate, early end.

Where the plan has a release gate, an adapter is evaluated before it is released, and never released
unevaluated. Otherwise it is released first, and a failed evaluation costs its figures only.
"""

from collections.abc import Callable
from dataclasses import dataclass

from umbel_common.adapters.vector import Vector
from umbel_common.errors import JobFailed, UmbelError
from umbel_common.plans.figures import Evaluation, GateResult
from umbel_common.plans.plan import TrainingPlan
from umbel_common.plans.statements import Release
from umbel_server.jobs.evaluator import check_evaluation
from umbel_server.jobs.interfaces import Evaluator, Observer
from umbel_server.storage.journal import Journal

Load = Callable[[], Vector]
"""Gives an adapter, which is read only where it is needed: it may be large."""


@dataclass(frozen=True)
class Judged:
    """What is known of a round's adapter before its release."""

    evaluation: Evaluation | None = None
    """None: the plan has no release gate."""
    gate: GateResult | None = None

    @property
    def held_back(self) -> bool:
        """Whether the adapter is not released."""
        return self.gate is not None and not self.gate.passed()


class Assessment:
    """Of one job; what it finds is in the journal."""

    def __init__(
        self, plan: TrainingPlan, store: Journal, evaluator: Evaluator | None, observer: Observer
    ) -> None:
        """Args:
        evaluator: None where adapters are not evaluated.
        """
        self._plan = plan
        self._store = store
        self._evaluator = evaluator
        self._observer = observer

    def check(self) -> None:
        """To be called before anything of the job is done.

        Raises:
            ConfigError, DataError: the plan has a release gate, and its adapters cannot be
                evaluated.
        """
        if self._plan.release_gate is None:
            return
        if self._evaluator is None:
            check_evaluation(None, self._plan)
        else:
            self._evaluator.check(self._plan)

    def begin(self, last: Release, load: Load) -> None:
        """Evaluates the release that the job goes on from, unless that was done.

        Args:
            load: gives that release's adapter.

        Raises:
            JobFailed: the plan has a release gate, and the evaluation failed.
        """
        done = {one.round for one in self._store.evaluations(self._plan.job)}
        if self._evaluator is None or last.round in done:
            return
        if self._plan.release_gate is None:
            self._evaluate_released(last.round, load(), None)
            return
        evaluation = self._evaluate(last.round, load(), None)
        self._store.record_evaluation(self._plan.job, last.round, evaluation)
        self._observer.evaluated(last.round, evaluation, None)

    def judge(self, round_number: int, adapter: Vector, before: Load) -> Judged:
        """Before a release: what the plan's release gate says of it.

        Args:
            before: gives the adapter that the round started from.

        Raises:
            JobFailed: the evaluation failed; nothing is released.
        """
        gate = self._plan.release_gate
        if gate is None:
            return Judged()
        evaluation = self._evaluate(round_number, adapter, before())
        kept = [one for one in self._store.evaluations(self._plan.job) if not one.held_back]
        return Judged(
            evaluation,
            GateResult(
                before=kept[-1].evaluation.mean_loss,
                after=evaluation.mean_loss,
                bound=gate.max_loss_increase,
            ),
        )

    def released(self, round_number: int, judged: Judged, adapter: Vector, before: Load) -> None:
        """After a release: tells what was found, or finds it now."""
        if judged.evaluation is not None:
            self._observer.evaluated(round_number, judged.evaluation, judged.gate)
        elif self._evaluator is not None:
            self._evaluate_released(round_number, adapter, before())

    def final_round(self) -> int | None:
        """The round with the best adapter, once the rounds after it have brought none better for as
        long as the operator waits; None: the job goes on."""
        patience = None if self._evaluator is None else self._evaluator.stop_after
        if patience is None:
            return None
        done = self._store.evaluations(self._plan.job)
        losses = {
            one.round: one.evaluation.mean_loss
            for one in done
            if not one.held_back and one.evaluation.mean_loss is not None
        }
        if not losses:
            return None
        best = min(losses, key=lambda number: losses[number])
        since = sum(one.round > best for one in done)
        return best if since >= patience else None

    def _evaluate_released(self, round_number: int, adapter: Vector, before: Vector | None) -> None:
        assert self._evaluator is not None
        try:
            evaluation = self._evaluator.evaluate(self._plan, adapter, before)
        except UmbelError as error:
            self._observer.unevaluated(round_number, error)
            return
        self._store.record_evaluation(self._plan.job, round_number, evaluation)
        self._observer.evaluated(round_number, evaluation, None)

    def _evaluate(self, round_number: int, adapter: Vector, before: Vector | None) -> Evaluation:
        assert self._evaluator is not None  # `check` saw to it
        try:
            return self._evaluator.evaluate(self._plan, adapter, before)
        except UmbelError as error:
            details = f"{error.message}: {error.found}" if error.found else error.message
            raise JobFailed(
                "an adapter cannot be evaluated, and the plan's release gate lets none pass"
                " unevaluated",
                field=f"{self._plan.job}, round {round_number}",
                found=details,
                remedy="put it right and resume the job: the round is done again, at no further"
                " privacy cost",
            ) from error
