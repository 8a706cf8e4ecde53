"""Tests on the site's own model that a private step keeps its promises, before the first is taken.

This module is part of the core of the privacy guarantee. Never test on real records, and never drop
a check.

It uses made-up records only: there is no private data, and nothing for the ledger to charge.
Afterwards the adapter is as before.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from umbel_client.data.tokens import Ints, Tokens
from umbel_client.dpsgd.gradient_sum import CLIPPINGS, take_gradients
from umbel_client.dpsgd.integer_sum import IntegerSum
from umbel_client.dpsgd.per_record import per_record_gradients
from umbel_client.dpsgd.private_step import PrivateOptimizer, private_step
from umbel_client.dpsgd.step_noise import StepNoise
from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.models.base.architecture import padding_of
from umbel_client.privacy.discrete_gaussian import DiscreteGaussian
from umbel_client.privacy.noise import NoiseSource
from umbel_client.tasks.prepared import PreparedData
from umbel_client.tasks.shapes import BatchLimit, Part
from umbel_client.tasks.task import made_up_labels, task_of
from umbel_client.training.bit_test import prove_shapes
from umbel_client.training.blind_test import blind_test
from umbel_client.training.optimiser import build_optimizer
from umbel_common.canonical import Entropy
from umbel_common.errors import ModelError
from umbel_common.plans.plan import Clipping, DifferentialPrivacy, DistributedPrivacy

LENGTHS = (9, 4, 7)
"""Tokens of each made-up record. They differ from each other and from the number of records, so
that a mistaken axis shows."""
EVERY = np.arange(len(LENGTHS))
EXCESS = (10.0, 0.5, 10.0)
"""Norms of their gradients in clip norms, when clipping is tested. One is below 1: some rules of
clipping scale it too."""

TOLERANCES = {"float32": 1e-3, "bfloat16": 0.1}
"""Largest relative difference of a gradient from that of its record alone. Rounding gives 1e-5 and
0.02; records that mix, or a missing term, give about 1."""

ODD_COORDINATES = 0.05
"""Largest share of the coordinates that may be another integer than the test expects. A norm that
is summed in another order moves a rare one; a sum that is rounded once moves a third of them."""

DRAWS = 20_000
"""Smallest number of draws that the noise is judged by: its standard deviation is then known to
3 %."""
ALARM = 17.0
"""Exponent of the test of the noise: sound noise is refused with a probability below
2 exp(-17) = 8.3e-8."""


def self_test(
    model: AdaptedModel, noise_multiplier: float | None, limit: BatchLimit, *, entropy: Entropy
) -> None:
    """Tests each kind of round that the model's plan has.

    It takes a dozen passes over very short records, and some over records of each padded length.

    Args:
        noise_multiplier: this site's; None exactly when the plan has no privacy. Then nothing is
            promised, and nothing is tested.
        limit: the number of records computed at once; numbers of rows that give a record other bits
            are taken out of it.
        entropy: the source of the noise that is tested; no round uses it.

    Raises:
        ModelError: says which promise does not hold, and by how much.
    """
    plan = model.plan
    if not isinstance(plan.privacy, DifferentialPrivacy) or noise_multiplier is None:
        return
    blind_test(model)
    with _borrowed(model):
        for trial in _trials(model, plan.privacy, noise_multiplier, entropy):
            alone = _gradients_alone(trial)
            with per_record_gradients(*model.copies):
                _check_separate(trial, alone)
                if isinstance(plan.privacy, DistributedPrivacy):
                    _check_whole_steps(trial, alone, plan.aggregation.step)
                    _check_integers(plan.privacy, entropy)
                else:
                    _check_clipped(trial, alone)
                    _check_noise(trial)
                    _check_moves(trial)
            _set_random(model)
            prove_shapes(model, limit, entropy=entropy)


def separation_test(model: AdaptedModel, *, entropy: Entropy) -> None:
    """Tests what depends on the architecture alone: that records have gradients of their own.

    It is for a plan that is being made. A site takes the whole `self_test`.

    Raises:
        ModelError: see `self_test`.
    """
    plan = model.plan
    if not isinstance(plan.privacy, DifferentialPrivacy):
        return
    blind_test(model)
    with _borrowed(model):
        for trial in _trials(model, plan.privacy, 1.0, entropy):
            alone = _gradients_alone(trial)
            with per_record_gradients(model):
                _check_separate(trial, alone)


def _trials(
    model: AdaptedModel, privacy: DifferentialPrivacy, noise_multiplier: float, entropy: Entropy
) -> "Iterator[_Trial]":
    """Each kind of round that the plan has, with a random adapter that it sets."""
    plan = model.plan
    data = _made_up(model)
    for round_number in plan.kinds_of_rounds:
        trial = _Trial(
            model=model,
            data=data,
            round_number=round_number,
            parameters=model.select(round_number),
            clip_norm=privacy.clip_norm,
            clipping=privacy.clipping,
            noise_multiplier=noise_multiplier,
            entropy=entropy,
        )
        _set_random(model)
        yield trial


@dataclass(frozen=True)
class _Trial:
    model: AdaptedModel
    data: PreparedData
    round_number: int
    parameters: dict[str, nn.Parameter]
    clip_norm: float
    clipping: Clipping
    noise_multiplier: float
    entropy: Entropy

    def losses(self, indices: Ints) -> torch.Tensor:
        """float32[n]."""
        with torch.enable_grad():
            task, lengths = task_of(self.model.plan.task), self.data.tokens.lengths
            part = Part(indices, int(lengths[indices].max()), len(indices))
            return task.losses(self.model, task.batch(self.data, part))

    @contextmanager
    def optimizer(
        self,
        inner: torch.optim.Optimizer,
        *,
        noise_multiplier: float,
        expected_batch_size: float = 1.0,
        steps: int = 1,
    ) -> Iterator[PrivateOptimizer]:
        """A round's optimizer, for an expected batch of one record unless the caller says more."""
        with StepNoise(self.entropy, list(self.parameters.values()), steps=steps) as noise:
            yield PrivateOptimizer(
                inner,
                noise,
                noise_multiplier=noise_multiplier,
                clip_norm=self.clip_norm,
                expected_batch_size=expected_batch_size,
                clipping=CLIPPINGS[self.clipping],
                copies=self.model.in_copies(inner),
            )

    def descent(self) -> torch.optim.Optimizer:
        """An optimizer that subtracts exactly the gradient that it is given."""
        return torch.optim.SGD(list(self.parameters.values()), lr=1.0)

    def step_from_zero(self, optimizer: PrivateOptimizer) -> torch.Tensor:
        """What a step of `descent` subtracts, float64[elements].

        The step starts from zero, so that the result is not rounded.
        """
        self.model.set_vector(np.zeros(self.model.plan.lora.size, dtype=np.float32))
        optimizer.step()
        return -torch.cat([p.detach().flatten().cpu() for p in self.parameters.values()]).double()


@contextmanager
def _borrowed(model: AdaptedModel) -> Iterator[None]:
    vector = model.vector()
    trained = {name: parameter.requires_grad for name, parameter in model.adapter.items()}
    try:
        yield
    finally:
        model.set_vector(vector)
        for copy in model.copies:
            for name, parameter in copy.adapter.items():
                parameter.requires_grad_(trained[name])
                parameter.grad = None


def _made_up(model: AdaptedModel) -> PreparedData:
    """Three records of random tokens, none of them the padding token."""
    pad = padding_of(model.base)
    random = np.random.default_rng(0)
    lengths = [min(length, model.plan.task.max_tokens) for length in LENGTHS]
    ids = random.integers(0, model.vocabulary - 1, sum(lengths))
    ids += ids >= pad
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = Tokens(ids.astype(np.int32), starts, pad)
    return PreparedData(tokens, made_up_labels(model.plan.task, tokens), prefix=None)


def _set_random(model: AdaptedModel) -> None:
    """Fills the adapter with random values: B = 0 would hide A's part in the output."""
    random = np.random.default_rng(0)
    model.set_vector(random.normal(0, 0.05, model.plan.lora.size).astype(np.float32))


def _gradients_alone(trial: _Trial) -> torch.Tensor:
    """The gradient of each record by itself, float64[n, elements], with torch and PEFT alone."""
    rows = []
    for index in EVERY:
        loss = trial.losses(np.array([index])).sum()
        found = torch.autograd.grad(loss, list(trial.parameters.values()), allow_unused=True)
        used = [gradient for gradient in found if gradient is not None]
        if len(used) < len(found):
            named = zip(trial.parameters, found, strict=True)
            raise ModelError(
                "a trained tensor has no part in the model's output",
                found=", ".join(name for name, gradient in named if gradient is None),
                remedy="stop: privacy would be spent for nothing; check the version of PEFT",
            )
        rows.append(torch.cat([gradient.flatten().cpu() for gradient in used]))
    alone = torch.stack(rows).double()
    norms = alone.norm(dim=1)
    if not (torch.isfinite(norms) & (norms > 0)).all():
        raise ModelError("a record's gradient has no direction", found=f"norms {_shown(norms)}")
    return alone


def _check_separate(trial: _Trial, alone: torch.Tensor) -> None:
    """Checks that a record's gradient in a batch is the one that it has alone.

    Alone, a record has neither neighbours nor padding. What a layer that mixes the batch, or a
    wrong mask, takes from them is a difference.
    """
    trial.losses(EVERY).sum().backward()  # type: ignore[no-untyped-call]  # torch
    gradients = take_gradients(list(trial.parameters.values()), len(EVERY))
    together = torch.cat([rows.cpu() for rows in gradients], dim=1).double()
    errors = (together - alone).norm(dim=1) / alone.norm(dim=1)
    tolerance = TOLERANCES[trial.model.precision]
    if not (errors <= tolerance).all():
        raise ModelError(
            "the gradient of a record depends on the records beside it",
            found=f"relative differences {_shown(errors)}",
            accepted=f"at most {tolerance}",
            remedy="use a base model whose layers treat each record by itself",
        )


def _check_clipped(trial: _Trial, alone: torch.Tensor) -> None:
    """Checks the clipped sum, with losses scaled so that gradients have the norms of `EXCESS`."""
    _compute_long_gradients(trial, alone)
    with trial.optimizer(trial.descent(), noise_multiplier=0.0) as optimizer:
        optimizer.accumulate(len(EVERY))
        found = trial.step_from_zero(optimizer) / trial.clip_norm
    _require_clipped(trial, alone, found, rounding=0.0)


def _check_whole_steps(trial: _Trial, alone: torch.Tensor, grid: float) -> None:
    """Like `_check_clipped`, for sums in whole steps of the grid.

    The sensitivity is that of units that are rounded one by one, each coordinate by half a step at
    most (`umbel_client.privacy.shared_noise`).
    """
    _compute_long_gradients(trial, alone)
    parameters = list(trial.parameters.values())
    gradients = take_gradients(parameters, len(EVERY))

    def sum_of(records: Ints) -> torch.Tensor:
        """The sum over some records in steps, float64[elements]."""
        for parameter, rows in zip(parameters, gradients, strict=True):
            holder: Any = parameter
            holder.grad_sample = rows[records].clone()
        total = IntegerSum(
            parameters,
            clip_norm=trial.clip_norm,
            grid=grid,
            clipping=CLIPPINGS[trial.clipping],
            copies=trial.model.named_in_copies(trial.parameters),
        )
        total.accumulate(len(records))
        return torch.from_numpy(total.values()).double()

    whole = sum_of(EVERY)
    rounding = len(EVERY) * math.sqrt(len(whole)) / 2 * grid / trial.clip_norm
    _require_clipped(trial, alone, whole * grid / trial.clip_norm, rounding=rounding)
    each = torch.stack([sum_of(EVERY[[record]]) for record in EVERY])
    together = torch.cat([rows.cpu() for rows in gradients], dim=1).double()
    norms = together.norm(dim=1, keepdim=True) / trial.clip_norm
    if trial.clipping == "automatic":
        exact = together / (norms * trial.clip_norm + 0.01) * trial.clip_norm / grid
    else:
        exact = together / norms.clamp(min=1.0) / grid
    # What float32 cannot show of a large number of steps is no rounding to the grid.
    nearest = (each - exact).abs() <= 0.5 + exact.abs() * 2.0**-21
    equal = whole == each.sum(0)
    found = float((~equal).double().mean()), float((~nearest).double().mean())
    if not max(found) <= ODD_COORDINATES:
        raise ModelError(
            "the gradients of records are not rounded one by one to the nearest step",
            found=f"{found[0]:.1%} of a sum's coordinates, {found[1]:.1%} of single records'",
            accepted=f"at most {ODD_COORDINATES:.0%}",
            remedy="stop: a sum would tell more than the noise was calculated for",
        )


def _compute_long_gradients(trial: _Trial, alone: torch.Tensor) -> None:
    """Gives the parameters gradients of the norms of `EXCESS`, in clip norms."""
    norms = alone.norm(dim=1, keepdim=True)
    excess = torch.tensor(EXCESS, dtype=torch.float64).unsqueeze(1)
    losses = trial.losses(EVERY)
    (losses * (excess * trial.clip_norm / norms).flatten().to(losses)).sum().backward()


def _require_clipped(
    trial: _Trial, alone: torch.Tensor, found: torch.Tensor, *, rounding: float
) -> None:
    """Requires that a sum, float64[elements] in clip norms, is that of clipped gradients.

    Args:
        rounding: what rounding to whole steps may add to its norm.
    """
    norms = alone.norm(dim=1, keepdim=True)
    excess = torch.tensor(EXCESS, dtype=torch.float64).unsqueeze(1)
    # Other arithmetic than the step's: a fault there must not hide itself here.
    if trial.clipping == "automatic":
        shares = excess * trial.clip_norm / (excess * trial.clip_norm + 0.01)
    else:
        shares = excess.clamp(max=1.0)
    wanted = (shares * alone / norms).sum(0)
    if not (found - wanted).norm() <= len(EVERY) * TOLERANCES[trial.model.precision] + rounding:
        raise ModelError(
            "the gradients of records are not clipped to the clip norm",
            found=f"{float(found.norm()):.4g} clip norms in sum",
            accepted=f"{float(wanted.norm()):.4g}, for these records",
        )


def _check_noise(trial: _Trial) -> None:
    """Checks the standard deviation of the noise, with steps on no record at all.

    The bounds of a chi-squared sum are those of Laurent and Massart (2000, lemma 1).
    """
    steps = math.ceil(DRAWS / sum(parameter.numel() for parameter in trial.parameters.values()))
    with trial.optimizer(
        trial.descent(), noise_multiplier=trial.noise_multiplier, steps=steps
    ) as optimizer:
        draws = torch.cat([trial.step_from_zero(optimizer) for _ in range(steps)])
    _require_deviation(draws, trial.noise_multiplier * trial.clip_norm)


def _check_integers(privacy: DistributedPrivacy, entropy: Entropy) -> None:
    """Like `_check_noise`, for a site's share of integer noise, in steps."""
    draws = DiscreteGaussian(NoiseSource(entropy), privacy.noise_bits).draw(DRAWS)
    _require_deviation(torch.from_numpy(draws).double(), 2.0**privacy.noise_bits)


def _require_deviation(draws: torch.Tensor, wanted: float) -> None:
    """Requires that draws, float64[n], have a standard deviation."""
    found = float((draws / wanted).square().mean())
    spread = 2 * math.sqrt(ALARM / len(draws))
    if not 1 - spread <= found <= 1 + spread + 2 * ALARM / len(draws):
        raise ModelError(
            "the noise is not the one that the privacy was calculated from",
            found=f"standard deviation {wanted * math.sqrt(found):.6g}",
            accepted=f"{wanted:.6g}",
            remedy="stop: releases would not have the privacy that the ledger says",
        )


def _check_moves(trial: _Trial) -> None:
    """Checks that the plan's own optimizer changes every trained tensor (opacus issue 820)."""
    _set_random(trial.model)
    before = {name: parameter.detach().clone() for name, parameter in trial.parameters.items()}
    plan = trial.model.plan
    trained, noise = plan.trained_tensors(trial.round_number), trial.noise_multiplier
    inner = build_optimizer(plan, trained, trial.parameters, noise)
    task = task_of(plan.task)
    with trial.optimizer(
        inner,
        noise_multiplier=noise,
        expected_batch_size=plan.training.expected_batch_size,
    ) as optimizer:
        private_step(task, trial.model, trial.data, EVERY, optimizer, BatchLimit(2))
    still = [name for name, value in before.items() if torch.equal(value, trial.parameters[name])]
    if still:
        raise ModelError(
            "a training step left the adapter as it was",
            found=", ".join(still),
            accepted="every trained tensor changes",
            remedy="stop: privacy would be spent for nothing; check learning rates and device",
        )
    vector = trial.model.vector()
    if not all(np.array_equal(copy.vector(), vector) for copy in trial.model.copies):
        raise ModelError(
            "the copies of the model have different adapters after a training step",
            field="model.split",
            found=", ".join(str(copy.device) for copy in trial.model.copies),
            accepted="the same values on each device",
            remedy="stop: how a record is computed would follow from the other records",
        )


def _shown(values: torch.Tensor) -> str:
    """Values of made-up records, for a message: nothing private."""
    return ", ".join(f"{value:.2g}" for value in values.tolist())
