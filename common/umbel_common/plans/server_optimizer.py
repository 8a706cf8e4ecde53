"""How the server's step follows from a round's sum (Reddi et al. 2021, "Adaptive Federated
Optimization").

The sum is turned into a change: the weighted mean of the deltas, or in distributed mode the
negative mean gradient. The optimizer turns the change into the step that is added to the adapter.
`umbel_common.adapters.server_step` computes it.
"""

from decimal import Context, Decimal, localcontext
from typing import Annotated, Literal, TypeAlias

import msgspec

from umbel_common.canonical import Value
from umbel_common.plans.ranges import Fraction, LearningRate, Positive

_PI = Decimal("3.14159265358979323846264338327950288419716939937511")


class Schedule(Value, frozen=True):
    """The factor of a learning rate, by round."""

    warmup_rounds: Annotated[int, msgspec.Meta(ge=0, le=10_000)] = 0
    """Number of first rounds in which the factor rises linearly to 1: with w of them, it is
    r / (w + 1) in round r."""
    decay: Literal["linear", "cosine"] = "linear"
    """Curve on which the factor falls after the warm-up, to `final` in the plan's last round."""
    final: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    """Factor of the last round; 1: the learning rate does not fall."""

    def factor(self, round_number: int, rounds: int) -> float:
        """The factor of a round (from 1) of a job of `rounds` rounds: above 0, and at most 1.

        Every operation is exactly rounded, so the factor has the same bits on every machine.
        """
        if round_number <= self.warmup_rounds:
            return round_number / (self.warmup_rounds + 1)
        done, of = round_number - self.warmup_rounds - 1, rounds - self.warmup_rounds - 1
        if of <= 0:
            return 1.0
        left = 1.0 - done / of if self.decay == "linear" else _half_cosine(done, of)
        return self.final + (1.0 - self.final) * left


def _half_cosine(done: int, of: int) -> float:
    """(1 + cos(pi done / of)) / 2. The last bit of a library's cosine differs between builds."""
    with localcontext(Context(prec=50)):
        square = (_PI * done / of) ** 2
        total = term = Decimal(1)
        number = 0
        while abs(term) > Decimal("1e-45"):
            number += 2
            term *= -square / (number * (number - 1))
            total += term
        return float((1 + total) / 2)


class Average(Value, frozen=True, tag_field="optimizer", tag="average"):
    """The change itself is the step (FedAvg, McMahan et al. 2017). It has no state."""


class _Rates(Value, frozen=True):
    adapter_learning_rate: LearningRate
    head_learning_rate: LearningRate | None = None
    """Learning rate of a classification head; None: that of the adapter."""
    schedule: Schedule = Schedule()

    def learning_rate(self, *, head: bool, round_number: int, rounds: int) -> float:
        """The learning rate of a round (from 1) of a job of `rounds` rounds."""
        rate = self.adapter_learning_rate
        if head and self.head_learning_rate is not None:
            rate = self.head_learning_rate
        return rate * self.schedule.factor(round_number, rounds)


class ServerSgd(_Rates, frozen=True, tag_field="optimizer", tag="sgd"):
    """Gradient descent, with momentum FedAvgM (Hsu, Qi and Brown 2019).

    The momentum is a sum, as PyTorch's is: with momentum m, a lasting change moves the adapter by
    1 / (1 - m) times the learning rate.
    """

    momentum: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    """Whether the step looks one step ahead (Nesterov 1983), as PyTorch's does."""


class ServerAdam(_Rates, frozen=True, tag_field="optimizer", tag="adam"):
    """FedAdam (Reddi et al. 2021, algorithm 2), with Adam's correction of the first rounds.

    A step has the same length however large the noise is, so its learning rate must follow the
    noise.
    """

    beta1: Fraction = 0.9
    beta2: Fraction = 0.99
    eps: Positive = 1e-8
    """Number added to the root of the second moment."""


class ServerYogi(_Rates, frozen=True, tag_field="optimizer", tag="yogi"):
    """FedYogi (Reddi et al. 2021, algorithm 2), with Adam's correction of the first rounds."""

    beta1: Fraction = 0.9
    beta2: Fraction = 0.99
    eps: Positive = 1e-8
    """Number added to the root of the second moment."""


ServerOptimizer: TypeAlias = Average | ServerSgd | ServerAdam | ServerYogi
"""The optimizers of the server that a plan can name."""
