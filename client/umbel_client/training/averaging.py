"""Average of the parameters over a round's steps, released in place of the last step's parameters.

This module is part of the core of the privacy guarantee. Under a plan with privacy only what noisy
gradients have moved reaches the average: never add anything else that is computed from the records.

De et al. (2022), "Unlocking High-Accuracy Differentially Private Image Classification through
Scale", section 3: noise averages out over the steps, and what is learned does not. The noise of
each step stays as it is, so averaging is post-processing.
"""

import numpy as np
import numpy.typing as npt

from umbel_common.adapters.vector import Vector


class MovingAverage:
    """Exponential moving average without the bias of an initial value.

    a_t = (1 - d) sum_i d^(t - i) x_i / (1 - d^t), as Adam corrects its moments (Kingma and Ba 2015,
    section 3): the weights sum to one from the first value on.
    """

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._sum: npt.NDArray[np.float64] | float = 0.0
        self._weight = 0.0

    def add(self, values: Vector) -> None:
        """Takes the next value, float32[n]."""
        self._sum = self._decay * self._sum + (1 - self._decay) * values.astype(np.float64)
        self._weight = self._decay * self._weight + (1 - self._decay)

    def value(self) -> Vector:
        """Returns the average, float32[n]; at least one value must have been added."""
        return np.asarray(self._sum / self._weight, dtype=np.float32)
