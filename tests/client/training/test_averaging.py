"""The average of a round's steps: the debiased moving average, and what a plan does with it."""

import numpy as np
import pytest

from umbel_client.training.averaging import MovingAverage


def reference(values: np.ndarray, decay: float) -> np.ndarray:
    """By its weights, float64: the latest value has the largest."""
    weights = decay ** np.arange(len(values))[::-1]
    return (weights[:, None] * values).sum(0) / weights.sum()


@pytest.mark.parametrize("decay", [0.1, 0.9, 0.999])
@pytest.mark.parametrize("count", [1, 2, 50])
def test_it_is_the_average_with_geometric_weights(decay: float, count: int) -> None:
    values = np.random.default_rng(count).normal(0, 1, (count, 7)).astype(np.float32)
    average = MovingAverage(decay)
    for value in values:
        average.add(value)
    found = average.value()
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, reference(values.astype(float), decay), rtol=1e-5, atol=1e-7)


def test_the_first_value_is_its_own_average_and_is_not_changed() -> None:
    average, value = MovingAverage(0.99), np.array([3.0, -1.0], dtype=np.float32)
    average.add(value)
    np.testing.assert_allclose(average.value(), [3.0, -1.0], rtol=1e-6)
    average.add(np.zeros(2, dtype=np.float32))
    assert value.tolist() == [3.0, -1.0]
