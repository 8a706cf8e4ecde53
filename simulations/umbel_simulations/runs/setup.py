"""What a run starts from: everything that follows from its scenario without training."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from umbel_client.privacy.calibration import noise_for
from umbel_common.adapters.vector import Vector
from umbel_common.errors import UmbelError
from umbel_common.plans.plan import TrainingPlan
from umbel_simulations.backends.site_config import public_size
from umbel_simulations.inputs.base_model import model_folder
from umbel_simulations.inputs.partition import partition, site_data, unit_count
from umbel_simulations.inputs.sources import Corpus, Example, load_source, repeated_for_test
from umbel_simulations.scenario.plan import make_plan, with_start
from umbel_simulations.scenario.scenario import Scenario

_logger = logging.getLogger("umbel.simulation")


@dataclass(frozen=True)
class RunSetup:
    """A scenario with its model, its records and its plan."""

    scenario: Scenario
    model: Path
    """Folder of the base model."""
    corpus: Corpus
    sites: Mapping[str, Sequence[Example]]
    """Training records of each site."""
    plan: TrainingPlan
    start: Vector | None = None
    """The adapter that the plan starts from; None: it follows from the plan's seed."""


def load_setup(scenario: Scenario) -> RunSetup:
    """Reads model and records, divides them among the sites, and makes the plan.

    Nothing is written: a scenario that cannot run leaves nothing behind.

    Raises:
        DataError: the records cannot be read, or a site has too few of them.
        ModelError, PlanError: the model is missing, or does not fit the scenario.
        CalibrationError, PolicyRefusal: a site cannot have the plan's privacy.
    """
    model = model_folder(scenario.model)
    corpus = load_source(scenario)
    repeated = repeated_for_test(corpus)
    if repeated:
        _logger.warning(
            "%d of %d test records are training records too: what is measured on them may be"
            " remembered",
            repeated,
            len(corpus.test),
        )
    sites = partition(corpus.train, scenario.sites, scenario.seed)
    largest = max(len(examples) for examples in sites.values())
    holdout = site_data(corpus.test)
    plan = make_plan(scenario, corpus.labels, model, largest_site=largest, holdout=holdout)
    _check_sites(plan, sites)
    plan, start = with_start(plan, scenario, corpus.titles, model)
    return RunSetup(scenario, model, corpus, sites, plan, start)


def _check_sites(plan: TrainingPlan, sites: Mapping[str, Sequence[Example]]) -> None:
    """Finds out early what a site would refuse the plan for."""
    for site, examples in sites.items():
        try:
            noise_for(plan, public_size(unit_count(examples)))
        except UmbelError as error:
            error.field = f"{site}, {error.field}"
            raise
