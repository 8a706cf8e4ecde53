"""Clipping, summing and noise, on made-up gradients and beside Opacus' own optimiser."""

import numpy as np
import pytest
import torch
from opacus.optimizers import DPOptimizer
from support import pretended

from umbel_client.dpsgd import private_step
from umbel_client.dpsgd.gradient_sum import Clipping, automatic, flat
from umbel_client.dpsgd.private_step import PrivateOptimizer
from umbel_client.dpsgd.step_noise import StepNoise
from umbel_client.privacy.noise import NoiseSource

torch.set_num_threads(1)

CPU = torch.device("cpu")
HERE, THERE = map(torch.device, pretended.DEVICES)


def fixed(byte: int):
    return lambda length: bytes([byte]) * length


def made_up(records: int, scale: float = 1.0) -> list[torch.Tensor]:
    """Gradients of some records for three parameters, of very different lengths."""
    generator = torch.Generator().manual_seed(records)
    lengths = scale * 10 ** torch.linspace(-2, 1, records)[:, None]
    return [lengths * torch.randn(records, size, generator=generator) for size in (5, 1, 24)]


def clipped_sum(
    gradients: list[torch.Tensor], units: np.ndarray | None, clip_norm: float, clipping: Clipping
) -> torch.Tensor:
    """Of one device."""
    return private_step.clipped_sum({CPU: gradients}, units, clip_norm, clipping)[CPU]


@pytest.mark.parametrize("clip_norm", [0.01, 3.0, 1e4])
def test_two_physical_batches_and_a_step_are_those_of_opacus(clip_norm: float) -> None:
    """The noise is compared apart: by its scale, since the sources differ."""
    shapes = [(5,), (1,), (4, 6)]
    ours = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    settings = {"noise_multiplier": 0.0, "expected_batch_size": 7.5}
    mine = PrivateOptimizer(
        torch.optim.Adam(ours, lr=0.1),
        StepNoise(fixed(1), ours, steps=3),
        clip_norm=clip_norm,
        **settings,
    )
    opacus = DPOptimizer(torch.optim.Adam(theirs, lr=0.1), max_grad_norm=clip_norm, **settings)
    for _step in range(3):
        for records in (5, 3):
            for p, q, rows in zip(ours, theirs, made_up(records), strict=True):
                p.grad_sample = rows.clone().view(records, *p.shape)
                q.grad_sample = rows.clone().view(records, *p.shape)
            mine.accumulate(records)
            opacus.signal_skip_step(do_skip=records == 5)
            opacus.step()
            if records == 5:
                opacus.zero_grad()
        mine.step()
        for p, q in zip(ours, theirs, strict=True):
            # Opacus adds a millionth to each norm before it divides by it.
            torch.testing.assert_close(p.grad, q.grad, rtol=2e-5 / min(clip_norm, 1), atol=1e-7)
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
        opacus.zero_grad()


def test_noise_has_the_scale_of_opacus() -> None:
    ours, theirs = torch.nn.Parameter(torch.zeros(90_000)), torch.nn.Parameter(torch.zeros(90_000))
    settings = {"noise_multiplier": 1.5, "expected_batch_size": 4.0}
    mine = PrivateOptimizer(
        torch.optim.SGD([ours], lr=1.0),
        StepNoise(fixed(1), [ours], steps=1),
        clip_norm=0.2,
        **settings,
    )
    opacus = DPOptimizer(torch.optim.SGD([theirs], lr=1.0), max_grad_norm=0.2, **settings)
    torch.manual_seed(0)
    mine.step()
    theirs.grad_sample = torch.zeros(0, 90_000)
    opacus.step()
    assert float(ours.detach().std()) == pytest.approx(1.5 * 0.2 / 4, rel=0.02)
    assert float(ours.detach().std()) == pytest.approx(float(theirs.detach().std()), rel=0.02)


RIGHT = {"noise_multiplier": 1.5, "clip_norm": 3.0, "expected_batch_size": 7.5}
WRONG = {
    "a larger clip bound under the same noise": {
        "clip_norm": 3.3,
        "noise_multiplier": 1.5 * 3.0 / 3.3,
    },
    "another rule of clipping": {"clipping": automatic},
    "noise of a larger standard deviation": {"noise_multiplier": 1.6},
    "a sum that is not divided": {"expected_batch_size": 1.0},
    "a sum divided by the number of records in this batch": {"expected_batch_size": 8.0},
}
"""Settings under which our step must not equal that of Opacus under `RIGHT`."""


def assert_equal_to_opacus(
    monkeypatch: pytest.MonkeyPatch, ours: dict[str, object], theirs: dict[str, float]
) -> None:
    """Takes one step of gradient descent with each optimiser and compares gradients and parameters.

    The gradients of the eight records are the same, and so is the noise: Opacus' source of noise is
    replaced by the draws of ours.

    Raises:
        AssertionError: the two steps differ by more than float32 explains.
    """
    shapes, records = [(5,), (1,), (4, 6)], made_up(8)
    left = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    right = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    mine = PrivateOptimizer(
        torch.optim.SGD(left, lr=0.1), StepNoise(fixed(1), left, steps=1), **ours
    )
    opacus = DPOptimizer(
        torch.optim.SGD(right, lr=0.1),
        noise_multiplier=theirs["noise_multiplier"],
        max_grad_norm=theirs["clip_norm"],
        expected_batch_size=theirs["expected_batch_size"],
    )
    sizes = [parameter.numel() for parameter in right]
    draws = iter(torch.from_numpy(NoiseSource(fixed(1)).normal(sum(sizes))).split(sizes))

    def same_noise(*, std: float, reference: torch.Tensor, **_source: object) -> torch.Tensor:
        return (std * next(draws)).to(reference.dtype).view_as(reference)

    monkeypatch.setattr("opacus.optimizers.optimizer._generate_noise", same_noise)
    for p, q, rows in zip(left, right, records, strict=True):
        p.grad_sample = rows.clone().view(8, *p.shape)
        q.grad_sample = rows.clone().view(8, *q.shape)
    mine.accumulate(8)
    mine.step()
    opacus.step()
    assert next(draws, None) is None, "Opacus did not draw its noise as it does in 1.6"
    for p, q in zip(left, right, strict=True):
        # Opacus adds a millionth to each norm before it divides by it.
        torch.testing.assert_close(p.grad, q.grad, rtol=2e-5, atol=1e-6 * theirs["clip_norm"])
        torch.testing.assert_close(p, q, rtol=2e-5, atol=1e-7 * theirs["clip_norm"])


@pytest.mark.parametrize("clip_norm", [0.01, 3.0, 1e4])
def test_a_step_under_the_same_noise_is_that_of_opacus(
    monkeypatch: pytest.MonkeyPatch, clip_norm: float
) -> None:
    settings = {**RIGHT, "clip_norm": clip_norm}
    assert_equal_to_opacus(monkeypatch, settings, settings)


@pytest.mark.parametrize("changed", WRONG.values(), ids=WRONG)
def test_a_step_with_a_wrong_setting_is_not_that_of_opacus(
    monkeypatch: pytest.MonkeyPatch, changed: dict[str, object]
) -> None:
    """Without this, the comparison could be blind to what it compares."""
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        assert_equal_to_opacus(monkeypatch, {**RIGHT, **changed}, RIGHT)


def test_automatic_clipping_brings_every_gradient_to_nearly_the_clip_norm() -> None:
    for records in (1, 7):
        gradients = made_up(records)
        rows = torch.cat(gradients, dim=1)
        norms = rows.norm(dim=1, keepdim=True)
        wanted = (rows * 0.5 / (norms + 0.01)).sum(0)
        found = clipped_sum([g.clone() for g in gradients], None, 0.5, automatic)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert float(clipped_sum(made_up(1, 1e6), None, 0.5, automatic).norm()) <= 0.5 * (1 + 1e-6)


def test_a_unit_is_clipped_once_by_the_mean_of_its_records() -> None:
    gradients, units = made_up(7), np.array([9, 4, 9, 2, 9, 4, 7])
    rows = torch.cat(gradients, dim=1)
    means = torch.stack([rows[units == unit].mean(0) for unit in (2, 4, 7, 9)])
    clip_norm = float(means.norm(dim=1).median())
    wanted = (means * (clip_norm / means.norm(dim=1, keepdim=True)).clamp(max=1)).sum(0)
    found = clipped_sum([g.clone() for g in gradients], units, clip_norm, flat)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clipping", [flat, automatic])
def test_a_unit_moves_the_sum_by_the_clip_norm_at_most(clipping) -> None:
    """However many records it has, and when some of them overflow."""
    gradients = made_up(12, 50.0)
    for rows in gradients:
        rows[3], rows[5] = np.inf, 3e38
    units = np.array([0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 3])
    with_all = clipped_sum([g.clone() for g in gradients], units, 0.5, clipping)
    assert torch.isfinite(with_all).all()
    for unit in range(4):
        kept = units != unit
        without = clipped_sum([g[kept].clone() for g in gradients], units[kept], 0.5, clipping)
        assert 0.49 < float((with_all - without).norm()) <= 0.5 * (1 + 1e-5)


@pytest.mark.parametrize("clipping", [flat, automatic])
def test_a_gradient_near_the_end_of_float32_is_clipped_too(clipping) -> None:
    """Its factor is one or no smallest float32, which rounding to nearest made twice too large."""
    clip_norm = 1e-4
    for share in (0.51, 0.75, 1.6, 2.7):
        norm = clip_norm / (share * 2.0**-149)
        gradient = torch.full((1, int((norm / 3e38) ** 2)), 3e38)
        found = clipped_sum([gradient], None, clip_norm, clipping).double().norm()
        assert float(found) <= clip_norm * (1 + 1e-6)


def divided(gradients: list[torch.Tensor]) -> dict[torch.device, list[torch.Tensor]]:
    """The first two parameters on one device, the third on another."""
    first, second, third = (rows.clone() for rows in gradients)
    return {HERE: [first.to(HERE), second.to(HERE)], THERE: [third.to(THERE)]}


@pytest.mark.parametrize("units", [None, np.array([9, 4, 9, 2, 9, 4, 7])])
@pytest.mark.parametrize("clipping", [flat, automatic])
def test_a_record_on_two_devices_has_one_norm(clipping: Clipping, units: np.ndarray | None) -> None:
    gradients = made_up(7)
    # Where one part is shorter than the clip norm and the whole is longer, a norm of each device's
    # part would leave the record too long.
    clip_norm = 1.01 * float(gradients[2].norm(dim=1).median())
    wanted = clipped_sum([rows.clone() for rows in gradients], units, clip_norm, clipping)
    found = private_step.clipped_sum(divided(gradients), units, clip_norm, clipping)
    assert [total.device for total in found.values()] == [HERE, THERE] == list(found)
    together = torch.cat([total.cpu() for total in found.values()])
    torch.testing.assert_close(together, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("overflowing", [0, 2])
def test_a_record_that_overflows_on_one_device_is_left_out_on_both(overflowing: int) -> None:
    gradients = made_up(7)
    gradients[overflowing][3] = torch.inf
    found = private_step.clipped_sum(divided(gradients), None, 0.5, flat)
    kept = np.arange(7) != 3
    wanted = clipped_sum([rows[kept].clone() for rows in gradients], None, 0.5, flat)
    together = torch.cat([total.cpu() for total in found.values()])
    torch.testing.assert_close(together, wanted, rtol=1e-6, atol=1e-7)


def test_a_step_on_two_devices_is_that_on_one() -> None:
    """With the same noise: one helping for each number, wherever it lies."""
    shapes, found = [(5,), (1,), (4, 6)], []
    for devices in ((CPU,) * 3, (HERE, HERE, THERE)):
        parameters = [
            torch.nn.Parameter(torch.ones(shape, device=device))
            for shape, device in zip(shapes, devices, strict=True)
        ]
        optimizer = PrivateOptimizer(
            torch.optim.Adam(parameters, lr=0.1),
            StepNoise(fixed(1), parameters, steps=2),
            noise_multiplier=1e-9,
            clip_norm=3.0,
            expected_batch_size=7.5,
        )
        for _step in range(2):
            for records in (5, 3):
                for parameter, rows in zip(parameters, made_up(records), strict=True):
                    holder = rows.view(records, *parameter.shape).to(parameter.device)
                    parameter.grad_sample = holder  # type: ignore[attr-defined]  # `per_record`
                optimizer.accumulate(records)
            optimizer.step()
        found.append(torch.cat([one.detach().cpu().flatten() for one in parameters]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("device", [CPU, HERE])
def test_noise_for_other_parameters_is_refused(device: torch.device) -> None:
    """Some numbers would have none."""
    trained = [torch.nn.Parameter(torch.zeros(4)), torch.nn.Parameter(torch.zeros(3))]
    other = [trained[0], torch.nn.Parameter(torch.zeros(3 - (device == CPU), device=device))]
    with pytest.raises(RuntimeError, match="the noise is for other parameters"):
        PrivateOptimizer(
            torch.optim.SGD(trained, lr=1.0),
            StepNoise(fixed(1), other, steps=1),
            noise_multiplier=1.0,
            clip_norm=1.0,
            expected_batch_size=1.0,
        )
