"""A plan's model, loaded onto the devices that a configuration says, in the precision for it."""

import logging
from functools import partial
from pathlib import Path

from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.models.base.device import (
    chosen_devices,
    described,
    prepare_training,
    require_alike,
)
from umbel_client.models.base.precision import chosen_precision
from umbel_client.models.base.spread import require_exact_copies
from umbel_client.site.config import ModelConfig
from umbel_common.plans.plan import DifferentialPrivacy, TrainingPlan

_logger = logging.getLogger("umbel.model")


def load_site_model(config: ModelConfig, plan: TrainingPlan, *, trains: bool) -> AdaptedModel:
    """The plan's model, with an adapter that `set_vector` must fill before use.

    Args:
        trains: whether steps of training follow; a private plan then allows no device that cannot
            keep its promises. Only then are there copies of the model.

    Raises:
        ConfigError: the configuration names a device that is not there, or cannot be used so.
        ModelError: see `AdaptedModel.load`.
    """
    devices = chosen_devices(config.device)
    copies = config.split == "records"
    if copies:
        devices = devices if trains else devices[:1]
        require_alike(devices)
        require_exact_copies(devices)
    if trains:
        for device in devices:
            prepare_training(device, private=isinstance(plan.privacy, DifferentialPrivacy))
    precision = chosen_precision(config.precision, *devices)
    _logger.info("the model computes on %s in %s", described(*devices), precision)
    load = partial(
        AdaptedModel.load,
        Path(config.path),
        plan,
        precision=precision,
        checkpointing=config.gradient_checkpointing,
        quantisation=config.quantisation,
    )
    if not copies:
        return load(device=tuple(map(str, devices)))
    # Each is read, and its digest compared, by itself.
    model, *others = (load(device=str(device)) for device in devices)
    model.add_copies(others)
    return model


def load_public(
    folder: Path,
    plan: TrainingPlan,
    device: str | tuple[str, ...],
    *,
    field: str = "compute.device",
    trains: bool = False,
) -> AdaptedModel:
    """The plan's model for public records, in the precision that is fastest on its device.

    Args:
        device: as in a site's client.toml.
        field: where that was said, for the error.
        trains: as `load_site_model`.

    Raises:
        ConfigError, ModelError: see `load_site_model`.
    """
    places = chosen_devices(device, field=field)
    if trains:
        for place in places:
            prepare_training(
                place, private=isinstance(plan.privacy, DifferentialPrivacy), field=field
            )
    precision = chosen_precision("fastest", *places)
    return AdaptedModel.load(folder, plan, device=tuple(map(str, places)), precision=precision)
