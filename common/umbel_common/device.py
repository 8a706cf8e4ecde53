"""Names of the devices that compute, as configurations and commands take them."""

import re

from umbel_common.errors import ConfigError

_LIST = "only model.device in client.toml takes several devices, as a list of texts"
_DEVICE = re.compile(r"auto|cpu|mps|cuda(:(0|[1-9]\d?))?")


def require_device(device: str, *, field: str, file: object = None) -> None:
    """Requires a text to name one device; whether it is there, the process that computes finds out.

    Raises:
        ConfigError: it does not.
    """
    if not _DEVICE.fullmatch(device):
        raise ConfigError(
            "a text names no device",
            file=file,
            field=field,
            found=device,
            accepted="auto, cpu, cuda, mps, or one of several GPUs: cuda:0, cuda:1, ...",
            remedy=_LIST if set(device) & set(",[") else None,
        )


def require_devices(devices: str | tuple[str, ...], *, field: str, file: object = None) -> None:
    """Requires a text to name one device, or a list to name CUDA devices, each once.

    A list of one device means that device.

    Raises:
        ConfigError: it does not.
    """
    if isinstance(devices, str):
        require_device(devices, field=field, file=file)
        return
    for device in devices:
        require_device(device, field=field, file=file)
    if len(devices) == 1 and devices[0] != "auto":
        return
    others = [device for device in devices if not device.startswith("cuda")]
    if not devices or others:
        raise ConfigError(
            "a list of devices names other things than CUDA devices"
            if others
            else "a list of devices is empty",
            file=file,
            field=field,
            found=", ".join(others) or "[]",
            accepted='CUDA devices, such as ["cuda:0", "cuda:1"]; or one text: auto, cpu, mps',
        )
    numbered = ["cuda:0" if device == "cuda" else device for device in devices]
    if len(set(numbered)) < len(numbered):
        raise ConfigError(
            "a list of devices names one of them twice",
            file=file,
            field=field,
            found=", ".join(devices),
            accepted="each device once; cuda is cuda:0",
        )
