"""Sums of clipped gradients in whole steps: exact in any order, and moved by the sensitivity."""

import math

import numpy as np
import pytest
import torch
from support import pretended

from umbel_client.dpsgd.gradient_sum import automatic, flat
from umbel_client.dpsgd.integer_sum import IntegerSum
from umbel_client.privacy.shared_noise import NoiseShares
from umbel_common.errors import ModelError

torch.set_num_threads(1)

GRID = 1e-5
SIZES = (5, 1, 24)


def gradients(records: int, seed: int = 0) -> list[torch.Tensor]:
    """Gradients of some records for three parameters, of very different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = 10 ** torch.linspace(-3, 2, records)[:, None]
    return [lengths * torch.randn(records, size, generator=generator) for size in SIZES]


def sum_of(
    rows: list[torch.Tensor],
    cuts: list[list[int]],
    *,
    units: np.ndarray | None = None,
    devices: tuple[str, str, str] = ("cpu", "cpu", "cpu"),
    **settings: object,
) -> np.ndarray:
    """The integer sum over physical batches, each a list of records."""
    parameters = [
        torch.nn.Parameter(torch.zeros(size, device=there))
        for size, there in zip(SIZES, devices, strict=True)
    ]
    total = IntegerSum(parameters, **{"clip_norm": 0.5, "grid": GRID, **settings})
    for records in cuts:
        for parameter, one in zip(parameters, rows, strict=True):
            parameter.grad_sample = one[records].clone().to(parameter.device)
        total.accumulate(len(records), None if units is None else units[records])
    return total.values()


def test_neither_order_nor_cuts_change_a_bit() -> None:
    rows = gradients(16)
    whole = sum_of(rows, [list(range(16))])
    order = np.random.default_rng(1).permutation(16).tolist()
    assert np.array_equal(sum_of(rows, [order]), whole)
    assert np.array_equal(sum_of(rows, [order[:3], order[3:4], order[4:]]), whole)
    # A sum of floats in the same orders differs.
    clipped = torch.cat(rows, 1)
    clipped *= 0.5 / clipped.norm(dim=1, keepdim=True).clamp(min=0.5)
    assert not torch.equal(clipped.sum(0), clipped[order].sum(0))


def test_sites_sum_to_what_one_site_with_all_records_would() -> None:
    rows = gradients(16)
    parts = [[0, 5, 9], [1, 2], list(range(3, 5)), [6, 7, 8, *range(10, 16)]]
    together = sum(sum_of(rows, [part]) for part in parts)
    assert np.array_equal(together, sum_of(rows, [list(range(16))]))


@pytest.mark.parametrize("clipping", [flat, automatic])
def test_the_sum_is_that_of_the_clipped_gradients(clipping) -> None:
    rows = gradients(16)
    found = sum_of(rows, [list(range(16))], clipping=clipping)
    long = torch.cat(rows, 1).double()
    factors = clipping(long.norm(dim=1), 0.5)
    wanted = (long * factors[:, None]).sum(0).numpy()
    assert found.dtype == np.int64
    np.testing.assert_allclose(found * GRID, wanted, atol=16 * GRID, rtol=1e-6)


@pytest.mark.parametrize("grid", [0.3, 0.01, GRID])
def test_one_record_moves_the_sum_by_the_sensitivity_at_most(grid: float) -> None:
    bound = NoiseShares(16, grid, 0.5, sum(SIZES)).sensitivity
    rows = gradients(64, seed=4)
    alone = [np.linalg.norm(sum_of(rows, [[one]], grid=grid)) for one in range(64)]
    assert max(alone) <= bound
    everyone = list(range(64))
    whole = sum_of(rows, [everyone], grid=grid)
    for one in everyone:
        without = sum_of(rows, [everyone[:one] + everyone[one + 1 :]], grid=grid)
        assert np.linalg.norm(whole - without) == pytest.approx(alone[one])


def test_the_rounding_of_a_record_counts_in_its_sensitivity() -> None:
    """On a coarse grid a clipped gradient becomes longer than the clip norm."""
    rows = [torch.full((1, size), 0.09) for size in SIZES]
    found = sum_of(rows, [[0]], grid=0.16)
    length = float(np.linalg.norm(found))
    assert 0.5 / 0.16 < length <= NoiseShares(16, 0.16, 0.5, sum(SIZES)).sensitivity
    assert length == pytest.approx(math.sqrt(sum(SIZES)))


def test_a_unit_is_averaged_and_clipped_as_one() -> None:
    rows = gradients(6)
    units = np.array([0, 0, 1, 1, 1, 2])
    found = sum_of(rows, [[0, 1, 2, 3, 4, 5]], units=units)
    long = torch.cat(rows, 1)
    means = torch.stack([long[units == unit].mean(0) for unit in range(3)])
    one_each = [part.clone() for part in torch.split(means, SIZES, dim=1)]
    np.testing.assert_allclose(found, sum_of(one_each, [[0, 1, 2]]), atol=3)


def test_several_devices_sum_as_one_does() -> None:
    rows = gradients(16)
    here, there = pretended.DEVICES
    found = sum_of(rows, [list(range(16))], devices=(there, here, there))
    assert np.array_equal(found, sum_of(rows, [list(range(16))]))


def test_an_overflowed_gradient_counts_as_zero() -> None:
    rows = gradients(4)
    without = sum_of(rows, [[0, 1, 3]])
    rows[1][2] = torch.inf
    rows[2][2, 3] = torch.nan
    assert np.array_equal(sum_of(rows, [[0, 1, 2, 3]]), without)


def test_gradients_that_are_not_one_for_each_record_are_refused() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    total = IntegerSum([parameter], clip_norm=1.0, grid=GRID)
    parameter.grad_sample = torch.ones(2, 3)
    with pytest.raises(ModelError):
        total.accumulate(3)
    total.discard()
    assert parameter.grad_sample is None
    assert not total.values().any()


def test_a_grid_finer_than_float32_is_refused() -> None:
    with pytest.raises(ValueError, match="steps"):
        IntegerSum([torch.nn.Parameter(torch.zeros(1))], clip_norm=1.0, grid=1e-8)
