"""What comes before the first round of a job at one site, and decides how its offer is answered.

This module is part of the core of the privacy guarantee. Never add or change here:

- A look at the records. The answer to an offer, and the time that it takes, are the same whatever
  they say; only public figures may decide.
- A job that opens without a check of the ledger, of the budget of the whole plan, or of the model.
"""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from umbel_client.data.site_data import SiteData
from umbel_client.dpsgd.batch_size import choose_batch_limit
from umbel_client.ledger.ledger import Ledger
from umbel_client.ledger.plan_cost import budget_of, cost_here, plan_cost, require_payable
from umbel_client.ledger.register import Register, marks_of
from umbel_client.models.base.architecture import naming_architecture
from umbel_client.models.site_model import load_site_model
from umbel_client.privacy.attempt_cost import attempt_cost
from umbel_client.privacy.calibration import noise_for
from umbel_client.site.config import ClientConfig
from umbel_client.storage.deltas import DeltaCache
from umbel_client.storage.journal import Published
from umbel_client.storage.noisy_sums import NoisySums
from umbel_client.tasks.label_names import computed_start
from umbel_client.tasks.prepared import prepare
from umbel_client.trainer.distributed_job import DistributedJob
from umbel_client.trainer.job import SiteJob
from umbel_client.trainer.local_job import LocalJob
from umbel_client.trainer.observer import Observer
from umbel_client.training.answer_time import WHEN_DONE, measure_answer_time
from umbel_client.training.largest_record import largest_record_test
from umbel_client.training.self_test import self_test
from umbel_common.canonical import Entropy
from umbel_common.plans.plan import TrainingPlan
from umbel_common.plans.start import LabelNamesStart
from umbel_common.trust.identity import Roster


def open_job(
    config: ClientConfig,
    plan: TrainingPlan,
    roster: Roster,
    data: SiteData,
    *,
    register: Register,
    published: Published,
    observer: Observer,
    entropy: Entropy,
) -> SiteJob:
    """Opens a job: what comes before its first round, step by step.

    a. Calibrate the noise, from public figures only (`delta-for-records`).
    b. Open the data set's ledger, unless the register says that another one is charged; enter it,
       verify it against what this site published, require that what an old copy lacks was stated,
       count the answers that left, and check the budget of the whole plan (`budget`).
    c. Load the model, and find the number of records computed at once.
    d. Test the model on made-up records: on the longest that the plan allows, on the checks of a
       private step, and on their bits in every shape.
    e. Prepare no record at all: what is wrong with the tokenizer or its template shows here.
       Compute the head from the names of its labels, which are in the plan, if it starts there.
    f. Find when answers leave, where this site wants that to tell nothing.

    The answer to an offer is what becomes of these steps, and costs nothing. So none of them looks
    at the records: the result, and the time that it takes, are the same whatever they say. A step
    that fails closes the ledger.

    Args:
        data: the site's records, as it read them when it started.
        register: which ledger each data set of this machine belongs to.
        published: what this site has published, from its journal; the ledger must know of it.
        observer: what follows the work at this site.
        entropy: the source of batches, noise and rounding.

    Raises:
        DataError: the site could not read its data when it started.
        ConfigError: the device is not there, or is not for private training.
        ModelError: the model does not fit the plan, or fails a test.
        CalibrationError: the plan's epsilon cannot be had with this data set.
        PolicyRefusal: `delta-for-records`, if the plan's delta is too large for this data set.
        BudgetError: the whole plan would exceed the data set's budget.
        LedgerError: the ledger is corrupt, in use, or rolled back, or the journal is rolled back;
            or the data set has another ledger (`register`); or the ledger is an old copy, and
            nobody stated what was spent since.
        StorageError: the ledger or the register cannot be used.
    """
    # a. Calibrate the noise. What a server can make this site refuse here depends on public figures
    #    only.
    noise = noise_for(plan, config.data.public_size)
    records = data.records(plan.task)
    with ExitStack() as opened:
        # b. Open the one ledger of the data set, verify it, and check the budget.
        state = config.state_folder
        marks = marks_of(config, records.source)
        if not state.ledger.exists():
            register.require_free(state.ledger, marks)
        ledger = Ledger.open(state.ledger, records.digest(), records.unit_column)
        opened.callback(ledger.close)
        register.enter(ledger, marks)
        if published.ledger_head is not None:
            ledger.verify(published.ledger_head)
        ledger.require_stated()
        ledger.keep_pace(published.answers)
        budget = budget_of(config, plan)
        cost = plan_cost(plan, noise, ledger.charges(), budget, unknown=ledger.unknown)
        require_payable(cost, plan, config)
        # c. Load the model, and find the number of records computed at once.
        model = load_site_model(config.model, plan, trains=True)
        has_units = records.unit_column is not None or bool(records.units)
        records_per_unit = config.data.max_records_per_unit if has_units else 1
        limit = choose_batch_limit(config.physical_batch_size, model, records_per_unit)
        # d. Test the model on made-up records.
        with naming_architecture(model.base):
            largest_record_test(model)
            self_test(model, noise.noise_multiplier, limit, entropy=entropy)
        # e. Prepare no record at all.
        prepare(model, Path(config.model.path), records.only(()), limit, cache=None)
        own_start = None
        if isinstance(plan.start, LabelNamesStart):
            own_start = computed_start(model, Path(config.model.path), plan)
        # f. Find when answers leave, where this site wants that to tell nothing.
        answer_time = WHEN_DONE
        if config.answer_time == "even":
            held_out = config.data.evaluation_share * config.data.public_size
            answer_time = measure_answer_time(
                model,
                limit,
                public_size=config.data.public_size,
                records_per_unit=records_per_unit,
                scored_units=0.0 if plan.evaluation is None else held_out,
            )
        parts: dict[str, Any] = {
            "plan": plan,
            "noise": noise,
            "_config": config,
            "_records": records,
            "_model": model,
            "_limit": limit,
            "_budget": budget,
            "_ledger": ledger,
            "_observer": observer,
            "_entropy": entropy,
            "_answer_time": answer_time,
            "own_start": own_start,
        }
        attempts = attempt_cost(plan)
        job: SiteJob
        if attempts is None:
            weight = _weight(plan, roster, config.site, len(records))
            job = LocalJob(**parts, _weight=weight, _deltas=DeltaCache(state.deltas(plan.job)))
        else:
            job = DistributedJob(**parts, _cost=attempts, _sums=NoisySums(state.deltas(plan.job)))
        opened.pop_all()
        return job


def check_payable(config: ClientConfig, plan: TrainingPlan) -> None:
    """Asks whether the budget allows the whole plan, before people are asked about the plan.

    `open_job` asks again, of the ledger that it opens.

    Raises:
        CalibrationError: the plan's epsilon cannot be had with this data set.
        PolicyRefusal: `delta-for-records`, if the plan's delta is too large for this data set.
        DataError: the plan expects a larger batch than this data set has.
        BudgetError: the whole plan would exceed the data set's budget.
        LedgerError, StorageError: the ledger cannot be read.
    """
    require_payable(cost_here(config, plan), plan, config)


def _weight(plan: TrainingPlan, roster: Roster, site: str, records: int) -> int:
    """The site's weight in the mean; a larger data set counts as the plan's largest weight."""
    match plan.aggregation.weights:
        case "equal":
            return 1
        case "size-class":
            return roster.member(site).weight
        case "examples":
            return min(records, plan.aggregation.max_weight)
