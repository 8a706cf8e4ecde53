"""DP-AdamBC: the paper's update, an unbiased second moment, a state that lives across rounds."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from umbel_client.training.dp_adam_bc import UnbiasedAdam
from umbel_client.training.optimiser import build_optimizer, extract_state, restore_state
from umbel_common.errors import PlanError
from umbel_common.plans.plan import Adam, LocalPrivacy, NoPrivacy, Training, TrainingPlan

torch.set_num_threads(1)

BETAS = (0.9, 0.99)


def reference(
    gradients: np.ndarray, rates: np.ndarray, deviation: float, least: float
) -> np.ndarray:
    """Tang et al. 2024, algorithm 1, in float64: the path from zero, [steps, elements]."""
    beta1, beta2 = BETAS
    theta, m, v, path = 0.0, 0.0, 0.0, []
    for t, (g, rate) in enumerate(zip(gradients.astype(float), rates, strict=True), start=1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
        theta = theta - rate * m_hat / np.sqrt(np.maximum(v_hat - deviation**2, least))
        path.append(theta)
    return np.stack(path)


def descend(
    optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter, gradients: np.ndarray
) -> np.ndarray:
    path = []
    for gradient in gradients:
        parameter.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
        path.append(parameter.detach().numpy().copy())
    return np.stack(path)


@pytest.mark.parametrize(("deviation", "least"), [(0.3, 1e-3), (0.3, 1e-8), (0.0, 1e-8)])
def test_steps_are_those_of_the_paper(deviation: float, least: float) -> None:
    random = np.random.default_rng(0)
    gradients = random.normal(0.2, 0.35, (60, 40)).astype(np.float32)
    parameter = torch.nn.Parameter(torch.zeros(40))
    optimizer = UnbiasedAdam(
        [{"params": [parameter], "lr": 0.01}],
        betas=BETAS,
        least_moment=least,
        noise_deviation=deviation,
    )
    found = descend(optimizer, parameter, gradients)
    wanted = reference(gradients, np.full(60, 0.01), deviation, least)
    # Near the floor a rounding error of the moment is as large as the moment.
    tolerance = 1e-5 if least > 1e-6 or deviation == 0 else 1e-3
    assert np.abs(found - wanted).max() < tolerance * np.abs(wanted).max()
    floored = np.abs(np.diff(wanted, axis=0)).max() > 0.05
    assert floored == (deviation > 0)


def test_the_second_moment_is_unbiased_where_adams_is_not() -> None:
    """A constant gradient beneath noise that is ten times larger."""
    signal, deviation, elements, steps = 0.01, 0.1, 20_000, 400
    random = np.random.default_rng(1)
    ours = torch.nn.Parameter(torch.zeros(elements))
    theirs = torch.nn.Parameter(torch.zeros(elements))
    unbiased = UnbiasedAdam(
        [{"params": [ours], "lr": 1e-6}],
        betas=BETAS,
        least_moment=1e-8,
        noise_deviation=deviation,
    )
    adam = torch.optim.Adam([theirs], lr=1e-6, betas=BETAS)
    for _ in range(steps):
        noisy = signal + deviation * random.standard_normal(elements)
        for parameter, optimizer in ((ours, unbiased), (theirs, adam)):
            parameter.grad = torch.from_numpy(noisy).float()
            optimizer.step()

    def moment(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> float:
        return float(optimizer.state[parameter]["exp_avg_sq"].double().mean()) / (
            1 - BETAS[1] ** steps
        )

    # Variance of one squared gradient, over as many as the average is as good as.
    variance = 2 * deviation**4 + 4 * signal**2 * deviation**2
    effective = elements * (1 + BETAS[1]) / (1 - BETAS[1])
    error = np.sqrt(variance / effective)
    assert 5 * error < 0.5 * signal**2
    # Sound moments are this far off less than once in a million.
    assert abs(moment(unbiased, ours) - signal**2) < 5 * error
    assert abs(moment(adam, theirs) - signal**2 - deviation**2) < 5 * error
    assert abs(moment(adam, theirs) - signal**2) > 50 * signal**2


def planned(
    make_plan: Callable[..., TrainingPlan], privacy: LocalPrivacy | NoPrivacy
) -> TrainingPlan:
    return make_plan(
        privacy=privacy,
        training=Training(
            rounds=2,
            local_steps=3,
            expected_batch_size=8,
            optimizer=Adam(
                adapter_learning_rate=0.01,
                head_learning_rate=0.03,
                beta1=BETAS[0],
                beta2=BETAS[1],
                eps=1e-3,
                unbiased=True,
            ),
        ),
    )


def test_a_plan_builds_it_with_the_sites_own_noise_and_its_state_goes_round(
    make_plan: Callable[..., TrainingPlan],
) -> None:
    """Broken off after three of six steps, with the state as arrays in between."""
    plan = planned(make_plan, LocalPrivacy(epsilon=8.0, delta=1e-5, clip_norm=0.5))
    trained = plan.trained_tensors(1)
    random = np.random.default_rng(2)
    gradients = {t.name: random.normal(0.1, 0.2, (6, *t.shape)).astype(np.float32) for t in trained}
    values = {t.name: torch.zeros(t.shape) for t in trained}
    state = None
    for steps in (range(3), range(3, 6)):
        parameters = {name: torch.nn.Parameter(value) for name, value in values.items()}
        optimizer = build_optimizer(plan, trained, parameters, 2.0)
        restore_state(optimizer, parameters, state)
        for step in steps:
            for name, parameter in parameters.items():
                parameter.grad = torch.from_numpy(gradients[name][step].copy())
            optimizer.step()
        state = extract_state(optimizer, parameters, state)
        values = {name: parameter.detach() for name, parameter in parameters.items()}
    for tensor in trained:
        rate = 0.03 if tensor.role == "head" else 0.01
        wanted = reference(gradients[tensor.name], np.full(6, rate), 2.0 * 0.5 / 8, 1e-3)[-1]
        np.testing.assert_allclose(values[tensor.name].numpy(), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("privacy", "noise_multiplier"),
    [(NoPrivacy(), 1.0), (LocalPrivacy(epsilon=8.0, delta=1e-5, clip_norm=0.5), None)],
)
def test_without_noise_there_is_nothing_to_subtract(
    make_plan: Callable[..., TrainingPlan],
    privacy: LocalPrivacy | NoPrivacy,
    noise_multiplier: float | None,
) -> None:
    plan = planned(make_plan, privacy)
    parameters = {t.name: torch.nn.Parameter(torch.zeros(t.shape)) for t in plan.lora.tensors}
    with pytest.raises(PlanError) as caught:
        build_optimizer(plan, plan.lora.tensors, parameters, noise_multiplier)
    assert caught.value.field == "training.optimizer.unbiased"
