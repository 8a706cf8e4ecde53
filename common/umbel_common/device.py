"""Names of the devices that compute, as configurations and commands take them."""

import re

from umbel_common.errors import ConfigError

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
        )
