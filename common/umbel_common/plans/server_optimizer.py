"""How the server's step follows from a round's sum (Reddi et al. 2021, "Adaptive Federated
Optimization").

The sum is turned into a change: the weighted mean of the deltas, or in distributed mode the
negative mean gradient. The optimizer turns the change into the step that is added to the adapter.
`umbel_common.adapters.server_step` computes it.
"""

from typing import Annotated, Literal, TypeAlias

import msgspec

from umbel_common.canonical import Value
from umbel_common.plans.ranges import Fraction, LearningRate, Positive


class Schedule(Value, frozen=True):
    """The factor of a learning rate, by round."""

    warmup_rounds: Annotated[int, msgspec.Meta(ge=0, le=10_000)] = 0
    """Number of first rounds in which the factor rises linearly to 1."""
    decay: Literal["linear", "cosine"] = "linear"
    """Curve on which the factor falls after the warm-up, to `final` in the plan's last round."""
    final: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    """Factor of the last round; 1: the learning rate does not fall."""


class Average(Value, frozen=True, tag_field="optimizer", tag="average"):
    """The change itself is the step (FedAvg, McMahan et al. 2017). It has no state."""


class _Rates(Value, frozen=True):
    adapter_learning_rate: LearningRate
    head_learning_rate: LearningRate | None = None
    """Learning rate of a classification head; None: that of the adapter."""
    schedule: Schedule = Schedule()


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
