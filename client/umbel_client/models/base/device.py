"""The device on which a model computes: what a site's people chose, as one that is there.

This module is part of the core of the privacy guarantee. Never let a private step run on a device
that lacks float64, and never let it run there with kernels whose results depend on chance.

A device changes speed and memory. What is charged, the order of a round, and the noise, which is
drawn on the host, are the same on each.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from umbel_common.device import require_device, require_devices
from umbel_common.errors import ConfigError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
"""The variable that gives cuBLAS workspaces of fixed size; without it, its sums depend on which
streams are busy."""

_HIDDEN = ("", "-1")
"""Values of CUDA_VISIBLE_DEVICES with which a person hides every GPU."""


def chosen_device(
    choice: str, *, field: str = "model.device", root: Path = Path("/")
) -> torch.device:
    """The device that a configuration or an option means on this machine.

    Args:
        choice: `auto` (the first CUDA device, or else the CPU), `cpu`, `cuda`, `cuda:N` or `mps`.
        field: the field or option that it comes from, for the error.
        root: the folder in which `proc` and `dev` are read.

    Raises:
        ConfigError: there is no such device, or PyTorch cannot use the GPU of this machine.
    """
    require_device(choice, field=field)
    kind = choice.partition(":")[0]
    if kind == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda:0")
        if has_nvidia_gpu(root):
            raise _no_cuda(choice, field, root)
        return torch.device("cpu")
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise _no_cuda(choice, field, root)
        device = torch.device("cuda:0" if choice == "cuda" else choice)
        if device.index >= torch.cuda.device_count():
            raise ConfigError(
                "a device is not there",
                field=field,
                found=choice,
                accepted=", ".join(f"cuda:{index}" for index in range(torch.cuda.device_count())),
                remedy="count from 0; CUDA_VISIBLE_DEVICES may hide devices from this process",
            )
        return device
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(
            "a device is not there",
            field=field,
            found=choice,
            accepted="auto, cpu, cuda",
            remedy="mps is the GPU of a Mac with Apple silicon",
        )
    return torch.device(choice)


def chosen_devices(
    choice: str | tuple[str, ...], *, field: str = "model.device", root: Path = Path("/")
) -> tuple[torch.device, ...]:
    """The devices that a configuration means on this machine: one, or several that share a model.

    Args:
        choice: see `chosen_device`; or a list of CUDA devices.

    Raises:
        ConfigError: see `chosen_device`; or the list is not one of different CUDA devices.
    """
    if isinstance(choice, str):
        return (chosen_device(choice, field=field, root=root),)
    require_devices(choice, field=field)
    return tuple(chosen_device(name, field=field, root=root) for name in choice)


def has_nvidia_gpu(root: Path = Path("/")) -> bool:
    """Whether this machine has an NVIDIA GPU that nobody hides from this process."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in _HIDDEN:
        return False
    gpus = root / "proc/driver/nvidia/gpus"
    return any(gpus.glob("*")) or any((root / "dev").glob("nvidia[0-9]*"))


def _no_cuda(choice: str, field: str, root: Path) -> ConfigError:
    """Why CUDA cannot be used, with what to install."""
    builds: Any = torch.version
    if builds.cuda is None and builds.hip is None:
        version = torch.__version__.partition("+")[0]
        return ConfigError(
            "this PyTorch was built without CUDA, and cannot use a GPU",
            field=field,
            found=f"{choice}, and torch {torch.__version__}",
            accepted=f"a build with CUDA, or {field} = cpu",
            remedy=f'pip install --force-reinstall --no-deps "torch=={version}" and the packages'
            " that it names (docs/gpu.md)",
        )
    there = has_nvidia_gpu(root)
    return ConfigError(
        "PyTorch finds no CUDA device that it can use",
        field=field,
        found=f"{choice}, and " + ("a GPU of NVIDIA" if there else "no GPU of NVIDIA"),
        accepted=f"a GPU with a driver for CUDA {builds.cuda}, or {field} = cpu",
        remedy="let this process use the devices /dev/nvidia* and update the driver (docs/gpu.md)",
    )


def require_alike(devices: Sequence[torch.device]) -> None:
    """Requires GPUs that are to hold copies of one model to be of one model themselves.

    Others round differently, and a record would have other bits on each.

    Raises:
        ConfigError: they have different names, or one of them does not answer.
    """
    shown = list(map(_described, devices))
    if len({one.partition(" ")[2] for one in shown}) > 1:
        raise ConfigError(
            "copies of a model cannot be on different kinds of GPU",
            field="model.device",
            found=", ".join(shown),
            accepted='GPUs of one kind, or split = "layers"',
        )


def memory_in_use(*devices: torch.device) -> str | None:
    """The memory of devices that is in use, for people; None: the system does not say.

    On a GPU, that of all processes; on the processor, what this process has in memory.
    """
    if devices[0].type == "cuda":
        each = [torch.cuda.mem_get_info(device) for device in devices]
        used = ((total - free, total) for free, total in each)
        return ", ".join(f"{one / 2**30:.1f} of {total / 2**30:.1f} GiB" for one, total in used)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    pages = next((line for line in lines if line.startswith("VmRSS:")), None)
    return None if pages is None else f"{int(pages.split()[1]) / 2**20:.1f} GiB"


def described(*devices: torch.device) -> str:
    """Devices for people: their names, and for a GPU its model and memory.

    Raises:
        ConfigError: a GPU is there, and does not answer.
    """
    return ", ".join(map(_described, devices))


def _described(device: torch.device) -> str:
    if device.type != "cuda":
        return str(device)
    try:
        found = torch.cuda.get_device_properties(device)
    except RuntimeError as error:
        raise ConfigError(
            "a GPU cannot be used",
            field="model.device",
            found=f"{device}: {error}",
            accepted="a GPU that is free and answers, or model.device = cpu",
            remedy="look at it with nvidia-smi: another process may have it alone",
        ) from None
    return f"{device} ({found.name}, {found.total_memory / 2**30:.0f} GiB)"


def prepare_training(device: torch.device, *, private: bool, field: str = "model.device") -> None:
    """Makes this process train on a device as the guarantee needs it, or refuses.

    Private steps on CUDA use deterministic kernels only, for as long as this process lives. Where
    PyTorch has none, it raises, so that the self-test before the first round refuses the job:
    elsewhere a record's bits would depend on chance (`umbel_client.training.bit_test`).

    Raises:
        ConfigError: norms of gradients need float64, which the device lacks.
    """
    if private and device.type == "mps":
        raise ConfigError(
            "private training needs float64 for norms of gradients, which this device lacks",
            field=field,
            found=str(device),
            accepted="cpu, cuda",
            remedy="mps is for trying adapters: classify, generate, evaluate",
        )
    if device.type == "cuda":
        # It is read once, when cuBLAS first computes: so also before a job without privacy.
        os.environ.setdefault(WORKSPACE, ":4096:8")
    if private and device.type == "cuda":
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
