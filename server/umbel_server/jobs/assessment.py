"""How good the adapters of a job are, round after round: figures, release gate, early end.

If the plan has a release gate, an adapter is evaluated before it is released: no change may let an
adapter past the gate unevaluated. Otherwise it is released first, and if its evaluation fails, only
its figures are missing.
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

LoadAdapter = Callable[[], Vector]
"""Reads an adapter. It may be large, so it is read only where it is needed."""


@dataclass(frozen=True)
class Judged:
    """What is known about a round's adapter before its release."""

    evaluation: Evaluation | None = None
    """None: the plan has no release gate."""
    gate: GateResult | None = None

    @property
    def held_back(self) -> bool:
        """Whether the adapter is not released."""
        return self.gate is not None and not self.gate.passed()


class Assessment:
    """The evaluations of one job; their results are in the journal."""

    def __init__(
        self, plan: TrainingPlan, journal: Journal, evaluator: Evaluator | None, observer: Observer
    ) -> None:
        """Args:
        evaluator: None if adapters are not evaluated.
        """
        self._plan = plan
        self._journal = journal
        self._evaluator = evaluator
        self._observer = observer

    def check(self) -> None:
        """Refuses a release gate that cannot be asked here; call it before the job starts.

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

    def begin(self, last: Release, load: LoadAdapter) -> None:
        """Evaluates the release that the job starts or resumes from, unless that was done.

        Args:
            load: reads the adapter of that release.

        Raises:
            JobFailed: the plan has a release gate, and the evaluation failed.
        """
        done = {one.round for one in self._journal.evaluations(self._plan.job)}
        if self._evaluator is None or last.round in done:
            return
        if self._plan.release_gate is None:
            self._evaluate_released(last.round, load(), None)
            return
        evaluation = self._evaluate(last.round, load(), None)
        self._journal.record_evaluation(self._plan.job, last.round, evaluation)
        self._observer.on_evaluated(last.round, evaluation, None)

    def judge(self, round_number: int, adapter: Vector, load_before: LoadAdapter) -> Judged:
        """Asks the plan's release gate about an adapter before its release.

        Args:
            load_before: reads the adapter that the round started from.

        Raises:
            JobFailed: the evaluation failed; nothing is released.
        """
        gate = self._plan.release_gate
        if gate is None:
            return Judged()
        evaluation = self._evaluate(round_number, adapter, load_before())
        kept = [one for one in self._journal.evaluations(self._plan.job) if not one.held_back]
        return Judged(
            evaluation,
            GateResult(
                before=kept[-1].evaluation.mean_loss,
                after=evaluation.mean_loss,
                bound=gate.max_loss_increase,
            ),
        )

    def assess_released(
        self, round_number: int, judged: Judged, adapter: Vector, load_before: LoadAdapter
    ) -> None:
        """Tells the observer what the release gate found, or evaluates the released adapter now.

        Args:
            load_before: reads the adapter that the round started from.
        """
        if judged.evaluation is not None:
            self._observer.on_evaluated(round_number, judged.evaluation, judged.gate)
        elif self._evaluator is not None:
            self._evaluate_released(round_number, adapter, load_before())

    def final_round(self) -> int | None:
        """The round with the best adapter, if enough rounds after it brought no better one.

        Returns:
            None if the job has to continue, or never ends early.
        """
        patience = None if self._evaluator is None else self._evaluator.stop_after
        if patience is None:
            return None
        done = self._journal.evaluations(self._plan.job)
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
            self._observer.on_unevaluated(round_number, error)
            return
        self._journal.record_evaluation(self._plan.job, round_number, evaluation)
        self._observer.on_evaluated(round_number, evaluation, None)

    def _evaluate(self, round_number: int, adapter: Vector, before: Vector | None) -> Evaluation:
        assert self._evaluator is not None  # `check` holds this
        try:
            return self._evaluator.evaluate(self._plan, adapter, before)
        except UmbelError as error:
            details = f"{error.message}: {error.found}" if error.found else error.message
            raise JobFailed(
                "an adapter cannot be evaluated, so it cannot pass the plan's release gate",
                field=f"{self._plan.job}, round {round_number}",
                found=details,
                remedy="correct the cause and resume the job: the round is repeated, at no further"
                " privacy cost",
            ) from error
