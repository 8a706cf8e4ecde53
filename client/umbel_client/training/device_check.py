"""A private step on a device, before a site's people trust it with records.

It is one small layer on made-up values: it shows that the device computes what the host does, not
how long a step of the site's own model takes.
"""

import time

import torch
from torch import nn

from umbel_client.dpsgd.fused import fused_linear
from umbel_client.dpsgd.private_step import PrivateOptimizer
from umbel_client.dpsgd.step_noise import StepNoise
from umbel_client.models.base.device import prepare_training
from umbel_common.canonical import Entropy
from umbel_common.errors import ModelError

_RECORDS, _INPUTS, _OUTPUTS = 16, 64, 8
_CLIP_NORM = 0.5
TOLERANCE = 1e-3
"""Largest relative difference from the step on the host."""


def try_private_step(device: torch.device, *, entropy: Entropy) -> float:
    """Takes two private steps on a device, and returns the seconds of the second one.

    Args:
        entropy: the source of noise, which is too small to be seen here.

    Raises:
        ConfigError: the device is not for private training.
        ModelError: the device cannot compute the step, or computes another one than the host.
    """
    prepare_training(device, private=True)
    wanted, _ = _steps(torch.device("cpu"), entropy)
    try:
        found, seconds = _steps(device, entropy)
    except RuntimeError as error:
        raise ModelError(
            "a device cannot compute a private step",
            field="model.device",
            found=f"{device}: {error}",
            accepted="a device with deterministic kernels, float64 and free memory",
        ) from None
    difference = float((found - wanted).norm() / wanted.norm())
    if not difference <= TOLERANCE:
        raise ModelError(
            "a device computes another private step than this machine's processor",
            field="model.device",
            found=f"{device}, a relative difference of {difference:.2g}",
            accepted=f"at most {TOLERANCE:g}",
            remedy="do not train on it; update its driver or PyTorch",
        )
    return seconds


def _steps(device: torch.device, entropy: Entropy) -> tuple[torch.Tensor, float]:
    """The layer's weights after two steps, on the host, and the seconds of the second step."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(_INPUTS, _OUTPUTS)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    layer = layer.to(device)
    records = torch.randn(_RECORDS, _INPUTS, generator=generator).to(device)
    with StepNoise(entropy, list(layer.parameters()), steps=2) as noise:
        optimizer = PrivateOptimizer(
            torch.optim.SGD(layer.parameters(), lr=0.1),
            noise,
            noise_multiplier=1e-9,
            clip_norm=_CLIP_NORM,
            expected_batch_size=float(_RECORDS),
        )

        def step() -> torch.Tensor:
            with torch.enable_grad():
                fused_linear(records, layer).square().sum().backward()  # type: ignore[no-untyped-call]
            optimizer.accumulate(_RECORDS)
            optimizer.step()
            return torch.cat([p.detach().flatten() for p in layer.parameters()]).cpu()

        step()
        began = time.perf_counter()
        return step(), time.perf_counter() - began
