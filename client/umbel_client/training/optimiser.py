"""The site's own optimizer: Adam or gradient descent, with state that lasts across rounds.

This module is part of the core of the privacy guarantee. Under a plan with privacy only noisy
gradients reach the state: never add anything else that is computed from the records.

The state is post-processing of noisy gradients. It stays at the site as plain arrays. Each is named
by its kind and its tensor, so that a round of `alternate` leaves the moments of the other matrix as
they were, and one of `fedsvd` can forget those of B.
"""

from collections.abc import Mapping

import torch
from torch import nn

from umbel_client.storage.deltas import OptimizerState
from umbel_client.training.dp_adam_bc import UnbiasedAdam
from umbel_common.errors import PlanError
from umbel_common.plans.plan import Adam, LocalPrivacy, Tensor, TrainingPlan


def build_optimizer(
    plan: TrainingPlan,
    trained: tuple[Tensor, ...],
    parameters: Mapping[str, nn.Parameter],
    noise_multiplier: float | None,
) -> torch.optim.Optimizer:
    """The plan's optimizer over a round's parameters: one group for the adapter, one for the head.

    Groups without parameters are left out.

    Args:
        trained: the tensors of the round.
        parameters: the model's parameters by the names of these tensors.
        noise_multiplier: standard deviation of this site's noise in units of the clip norm; None
            without privacy.

    Raises:
        PlanError: the plan has no optimizer at the sites; or it subtracts the noise's variance from
            Adam's second moment, and there is no noise.
    """
    settings = plan.training.site_optimizer
    adapter_rate = settings.adapter_learning_rate
    rates = {True: settings.head_learning_rate or adapter_rate, False: adapter_rate}
    groups = [
        {"params": members, "lr": rate, "planned_lr": rate}
        for is_head, rate in rates.items()
        if (members := [parameters[t.name] for t in trained if (t.role == "head") is is_head])
    ]
    if isinstance(settings, Adam):
        betas = (settings.beta1, settings.beta2)
        if settings.unbiased:
            deviation = _noise_deviation(plan, noise_multiplier)
            return UnbiasedAdam(
                groups, betas=betas, least_moment=settings.eps, noise_deviation=deviation
            )
        return torch.optim.Adam(groups, betas=betas, eps=settings.eps)
    return torch.optim.SGD(groups, momentum=settings.momentum)


def _noise_deviation(plan: TrainingPlan, noise_multiplier: float | None) -> float:
    """Standard deviation of the noise in one element of the optimizer's gradient: sigma C / B."""
    if not isinstance(plan.privacy, LocalPrivacy) or noise_multiplier is None:
        raise PlanError(
            "without noise there is nothing to subtract from Adam's second moment",
            field="training.optimizer.unbiased",
            found=True,
            accepted="false with privacy.mode none",
        )
    return noise_multiplier * plan.privacy.clip_norm / plan.training.expected_batch_size


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Sets the learning rate of each group to `factor` times the planned one."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["planned_lr"]


def carried_state(plan: TrainingPlan, state: OptimizerState | None) -> OptimizerState | None:
    """What of a former round's state the next round starts with.

    With the method fedsvd, the server rotates B with A after each round. The moments of B belong to
    the elements that it had before, so they start at zero again.
    """
    if state is None or plan.lora.method != "fedsvd":
        return state
    rotated = {tensor.name for tensor in plan.lora.tensors if tensor.role == "lora_B"}
    return {key: array for key, array in state.items() if key.partition("/")[2] not in rotated}


def restore_state(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    state: OptimizerState | None,
) -> None:
    """Gives the parameters the moments that `state` has for them; the others start at zero."""
    for key, array in (state or {}).items():
        kind, _, name = key.partition("/")
        if name in parameters:
            # Torch counts Adam's steps on the CPU.
            device = "cpu" if kind == "step" else parameters[name].device
            value = torch.from_numpy(array.copy()).to(device)
            optimizer.state[parameters[name]][kind] = value


def extract_state(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    state: OptimizerState | None,
) -> OptimizerState:
    """Returns `state` with copies of the moments of the parameters just trained."""
    result = dict(state or {})
    for name, parameter in parameters.items():
        for kind, value in optimizer.state[parameter].items():
            if isinstance(value, torch.Tensor):
                result[f"{kind}/{name}"] = value.detach().cpu().numpy().copy()
    return result
