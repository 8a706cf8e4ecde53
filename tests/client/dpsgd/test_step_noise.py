"""Noise that is drawn ahead: each number is added once, at its place in its step."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from support import pretended
from support.forks import is_refused_in_a_fork

from umbel_client.dpsgd import step_noise
from umbel_client.dpsgd.private_step import PrivateOptimizer
from umbel_client.dpsgd.step_noise import StepNoise
from umbel_client.privacy.noise import NoiseSource

HERE, THERE = pretended.DEVICES
SIZE = 1000


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_noise, "BLOCK", 64)


def vector(device: str = "cpu", size: int = SIZE) -> torch.Tensor:
    return torch.zeros(size, device=device)


def taken(noise: StepNoise, out: torch.Tensor) -> torch.Tensor:
    """A step's noise on the host, float64[elements], by way of `out` on the noise's device."""
    whole = out.double()
    for offset, draws in noise.take():
        whole[offset : offset + len(draws)].copy_(draws)
    return whole


def counting() -> Callable[[int], bytes]:
    """A source of keys in which each is another one, and the same ones for each caller."""
    state = iter(range(1 << 20))
    return lambda size: next(state).to_bytes(size, "big")


@pytest.mark.parametrize("size", [1, 63, 64, 65, 1000, 1001])
def test_each_number_of_each_step_has_its_own_draw(size: int) -> None:
    with StepNoise(os.urandom, [vector(size=size)], steps=3) as noise:
        steps = [taken(noise, vector(size=size)) for _ in range(3)]
    every = torch.cat(steps)
    assert len(torch.unique(every)) == 3 * size
    assert (every != 0).all()


def test_the_draws_are_standard_normal() -> None:
    size = 100_000
    with StepNoise(os.urandom, [vector(size=size)], steps=2) as noise:
        draws = torch.cat([taken(noise, vector(size=size)) for _ in range(2)]).numpy()
    assert stats.kstest(draws, "norm").pvalue > 1e-6


def test_a_blocks_draws_are_those_of_its_key() -> None:
    with StepNoise(counting(), [vector()], steps=2) as noise:
        first, second = (taken(noise, vector()) for _ in range(2))
    keys = counting()
    for offset in range(0, SIZE, 64):
        size = min(64, SIZE - offset)
        source = NoiseSource(keys)
        for step in (first, second):
            assert np.array_equal(step[offset : offset + size], source.normal(size))


def test_a_step_has_one_helping_of_noise_and_a_round_as_many_as_it_has_steps() -> None:
    with StepNoise(os.urandom, [vector()], steps=1) as noise:
        taken(noise, vector())
        with pytest.raises(RuntimeError, match="for 1 steps"):
            taken(noise, vector())


def test_a_step_that_failed_midway_leaves_no_noise_to_another() -> None:
    with StepNoise(os.urandom, [vector()], steps=3) as noise:
        next(noise.take())
        with pytest.raises(RuntimeError, match="was asked for"):
            taken(noise, vector())


def test_what_was_not_used_is_wiped() -> None:
    with StepNoise(os.urandom, [vector()], steps=3) as noise:
        taken(noise, vector())
        noise.wait()
        assert all(block._buffer.any() for block in noise._blocks.values())
    assert not any(block._buffer.any() for block in noise._blocks.values())
    with pytest.raises(RuntimeError, match="for 1 steps"):
        taken(noise, vector())


def test_the_last_steps_noise_is_wiped_when_it_is_used() -> None:
    noise = StepNoise(os.urandom, [vector()], steps=1)
    taken(noise, vector())
    assert not any(block._buffer.any() for block in noise._blocks.values())


def test_a_forked_process_has_no_use_of_it() -> None:
    with StepNoise(os.urandom, [vector()], steps=1) as noise:
        noise.wait()
        assert is_refused_in_a_fork(lambda: next(noise.take()))
        assert len(taken(noise, vector())) == SIZE


@pytest.mark.parametrize("size", [1, 63, 64, 65])
def test_a_block_lies_on_one_device(size: int) -> None:
    """Numbers of two devices are counted apart, so that a block never reaches over an end."""
    parameters = [vector(HERE, 65), vector(THERE, size), vector(HERE, 1)]
    with StepNoise(os.urandom, parameters, steps=2) as noise:
        assert noise.sizes == {torch.device(HERE): 66, torch.device(THERE): size}
        every = []
        for _step in range(2):
            places = {HERE: list[int](), THERE: list[int]()}
            for offset, draws in noise.take():
                places[str(draws.device)] += range(offset, offset + len(draws))
                every.append(draws.cpu())
            assert places == {HERE: list(range(66)), THERE: list(range(size))}
    assert len(torch.unique(torch.cat(every))) == 2 * (66 + size)


def test_noise_drawn_for_one_device_is_refused_on_another() -> None:
    with StepNoise(os.urandom, [vector(HERE, 4), vector(THERE, 4)], steps=1) as noise:
        here, there = noise._blocks
        noise.wait()
        noise._blocks[here], noise._blocks[there] = noise._blocks[there], noise._blocks[here]
        with pytest.raises(RuntimeError, match="was asked for"):
            list(noise.take())


@pytest.mark.parametrize(
    "parameters",
    [
        pytest.param([vector(HERE)], id="one device"),
        pytest.param([vector(HERE, 640), vector(THERE, SIZE - 640)], id="two devices"),
    ],
)
@pytest.mark.parametrize("waits", [True, False])
def test_a_buffer_is_filled_again_after_its_copy_has_ended(
    waits: bool, parameters: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device that copies late. Without the wait, two steps have the same noise, and what a
    server learns of their difference has none."""
    if not waits:
        draw = step_noise._Block.draw

        def at_once(self: Any, purpose: Any, _is_copied: Any) -> None:
            draw(self, purpose, lambda: None)

        monkeypatch.setattr(step_noise._Block, "draw", at_once)
    found = []
    with StepNoise(counting(), parameters, steps=3) as noise, pretended.late():
        for step in range(3):
            outs = {one.device: one.double() for one in parameters}
            for offset, draws in noise.take():
                outs[draws.device][offset : offset + len(draws)].copy_(draws)
            if step < 2:
                noise.wait()
            found.append(torch.cat([out.cpu() for out in outs.values()]))
    with StepNoise(counting(), [vector()], steps=3) as noise:
        wanted = [taken(noise, vector()) for _ in range(3)]
    if waits:
        assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
    else:
        assert torch.equal(found[0], wanted[1])
        assert torch.equal(found[1], found[2])


def test_a_round_that_ends_waits_until_its_noise_has_left_its_buffers() -> None:
    """A step's copies may be under way when the next thing fails: they would copy wiped buffers."""
    out = vector(THERE).double()

    def step_that_fails() -> None:
        with StepNoise(counting(), [vector(THERE)], steps=9) as noise:
            for offset, draws in noise.take():
                out[offset : offset + len(draws)].copy_(draws)
                if offset >= SIZE // 2:
                    raise KeyboardInterrupt

    with pretended.late():
        with pytest.raises(KeyboardInterrupt):
            step_that_fails()
        found = out.cpu()
    with StepNoise(counting(), [vector()], steps=9) as noise:
        wanted = taken(noise, vector())
    half = int(found.count_nonzero())
    assert half >= SIZE // 2
    assert torch.equal(found[:half], wanted[:half])


def test_a_sum_is_used_once_though_its_step_fails() -> None:
    parameter = torch.nn.Parameter(vector())
    inner = torch.optim.SGD([parameter], lr=1.0)

    def out_of_memory(*_: object) -> None:
        raise MemoryError

    settings = {"noise_multiplier": 0.0, "clip_norm": 1.0, "expected_batch_size": 1.0}
    with StepNoise(os.urandom, [parameter], steps=2) as noise:
        optimizer = PrivateOptimizer(inner, noise, **settings)
        parameter.grad_sample = torch.ones(1, SIZE)  # type: ignore[attr-defined]
        optimizer.accumulate(1)
        failing = inner.register_step_pre_hook(out_of_memory)
        with pytest.raises(MemoryError):
            optimizer.step()
        failing.remove()
        optimizer.step()
    assert not parameter.any()


def test_a_sum_and_its_noise_are_rounded_once() -> None:
    parameter = torch.nn.Parameter(vector())
    settings = {"noise_multiplier": 0.3, "clip_norm": 0.7, "expected_batch_size": 3.0}
    with StepNoise(counting(), [parameter], steps=1) as noise:
        optimizer = PrivateOptimizer(torch.optim.SGD([parameter], lr=1.0), noise, **settings)
        rows = torch.randn(1, SIZE)
        parameter.grad_sample = rows.clone()  # type: ignore[attr-defined]  # of `per_record`
        optimizer.accumulate(1)
        total = optimizer._sums[parameter.device].double()
        optimizer.step()
    with StepNoise(counting(), [parameter], steps=1) as noise:
        draws = taken(noise, vector())
    assert torch.equal(parameter.grad, ((draws * (0.3 * 0.7) + total) / 3.0).float())
