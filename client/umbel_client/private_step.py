"""One step of DP-SGD (Abadi et al. 2016, algorithm 1): per-record gradients, clip, sum, noise.

Opacus' hooks give the gradient of each record, its optimiser clips and sums them over physical
batches, and our CSPRNG gives the noise. No accounting happens here: the ledger has charged the
whole round before its first gradient.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from opacus.grad_sample import GradSampleHooks
from opacus.optimizers import DPOptimizer
from opacus.optimizers.optimizer import _check_processed_flag, _mark_as_processed

from umbel_client.model import AdaptedModel
from umbel_client.noise import NoiseSource
from umbel_client.prepared import PreparedData
from umbel_client.task import Task
from umbel_client.tokens import Ints
from umbel_common.errors import ModelError

# The lowest layers see constants, so torch warns that their hooks have no input gradient to give.
warnings.filterwarnings("ignore", message="Full backward hook is firing")


class PrivateOptimizer(DPOptimizer):  # type: ignore[misc]  # Opacus publishes no types
    """Opacus' optimiser with noise from a `NoiseSource` instead of torch's generator."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        noise: NoiseSource,
        *,
        noise_multiplier: float,
        clip_norm: float,
        expected_batch_size: float,
    ) -> None:
        declared: Any = expected_batch_size  # Opacus declares an int and only divides by it
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=clip_norm,
            expected_batch_size=declared,
            loss_reduction="mean",
        )
        self._noise = noise

    def add_noise(self) -> None:
        """Sum and noise are added in float64 and rounded once to float32."""
        parameters: list[Any] = self.params
        for parameter in parameters:
            _check_processed_flag(parameter.summed_grad)
            draws = torch.from_numpy(self._noise.normal(parameter.numel())).view(parameter.shape)
            total = parameter.summed_grad.double().cpu()
            total += draws * (self.noise_multiplier * self.max_grad_norm)
            parameter.grad = total.to(parameter)
            _mark_as_processed(parameter.summed_grad)


@contextmanager
def per_record_gradients(model: AdaptedModel) -> Iterator[None]:
    """Backward passes within fill `grad_sample`, float32[n, *shape], of each trained parameter.

    Raises:
        ModelError: a trained module keeps a state of its own.
    """
    try:
        hooks = GradSampleHooks(model, loss_reduction="sum", strict=True)
    except NotImplementedError as error:
        raise ModelError("a trained module has no per-record gradient", found=error) from None
    trained = [
        module
        for module in model.modules()
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    ]
    # Opacus' hooks sleep in evaluation mode; the layers they sit on are linear: both modes agree.
    for module in trained:
        module.training = True
    try:
        yield
    finally:
        for module in trained:
            module.training = False
        hooks.cleanup()


def private_step(
    task: Task,
    model: AdaptedModel,
    data: PreparedData,
    chosen: Ints,
    optimizer: PrivateOptimizer,
    physical_batch_size: int,
) -> None:
    """Takes one noisy step on the chosen records; with none chosen, on noise alone.

    Skipping an empty batch would tell that it was empty, and break the accounting.
    """
    parts = list(data.physical_batches(chosen, physical_batch_size))
    for number, part in enumerate(parts, start=1):
        with torch.enable_grad():
            task.losses(model, task.batch(data, part)).sum().backward()  # type: ignore[no-untyped-call]  # torch
        _separate_gradients(optimizer.params, len(part))
        optimizer.signal_skip_step(do_skip=number < len(parts))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if not parts:
        parameters: list[Any] = optimizer.params
        for parameter in parameters:
            parameter.grad_sample = parameter.new_zeros((0, *parameter.shape))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _separate_gradients(parameters: list[Any], records: int) -> None:
    """Makes sure of one finite float32 gradient for each record.

    A list would come from two passes that were mixed, another length from tokens that were taken
    for records. Norms of bfloat16 gradients would be bfloat16 too, and the clipping not exact.
    """
    for parameter in parameters:
        gradients = getattr(parameter, "grad_sample", None)
        if not isinstance(gradients, torch.Tensor) or len(gradients) != records:
            shape = tuple(gradients.shape) if isinstance(gradients, torch.Tensor) else None
            raise ModelError(
                "the gradients of records are not separate",
                found=shape,
                accepted=(records, *parameter.shape),
            )
        parameter.grad_sample = gradients.float()
    # A record whose gradient overflowed has no direction to clip; without this its NaN would pass
    # through clipping and noise, and say that the record is there.
    finite = torch.ones(records, dtype=torch.bool)
    for parameter in parameters:
        finite &= torch.isfinite(parameter.grad_sample).reshape(records, -1).all(dim=1).cpu()
    if not finite.all():
        for parameter in parameters:
            parameter.grad_sample[~finite.to(parameter.device)] = 0
