"""A plan's model as a site's configuration says to load it."""

from pathlib import Path

from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.models.base.precision import chosen_precision
from umbel_client.site.config import ModelConfig
from umbel_common.plans.plan import TrainingPlan


def load_site_model(config: ModelConfig, plan: TrainingPlan) -> AdaptedModel:
    """The plan's model, with an adapter that `set_vector` must fill before use.

    Raises:
        ModelError: see `AdaptedModel.load`.
    """
    return AdaptedModel.load(
        Path(config.path),
        plan,
        precision=chosen_precision(config.precision),
        checkpointing=config.gradient_checkpointing,
        quantisation=config.quantisation,
    )
