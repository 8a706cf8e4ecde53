"""Makes the training plan of a scenario, which its operator signs."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import msgspec

from umbel_client.models.adapters.lora import plan_lora
from umbel_client.models.adapters.targets import all_linear
from umbel_client.planning.distributed import DraftAggregation, DraftDistributed, planned
from umbel_client.planning.start import with_label_names
from umbel_common.adapters.vector import Vector
from umbel_common.errors import ConfigError
from umbel_common.plans.alike import check_labels
from umbel_common.plans.check import check_plan
from umbel_common.plans.drafted_start import DraftedLabelNames
from umbel_common.plans.plan import (
    Adam,
    BaseModel,
    CausalLm,
    Classification,
    NoOptimizer,
    ReleaseGate,
    Sgd,
    Task,
    Training,
    TrainingPlan,
    second_version,
)
from umbel_common.secagg.encoding import encoding_of
from umbel_host.files.model_digest import folder_digest
from umbel_simulations.scenario.scenario import Scenario


def make_plan(
    scenario: Scenario,
    labels: tuple[str, ...],
    model: Path,
    *,
    largest_site: int,
    holdout: bytes = b"",
    head_only: bool = False,
) -> TrainingPlan:
    """The plan of a scenario, without its `[start]` (`with_start`).

    Args:
        largest_site: number of records of the largest site; used if record counts are the weights.
        holdout: the file of public records that a release gate asks.
        head_only: whether to leave the adapter out, for the comparison.

    Raises:
        ModelError, PlanError: the model lacks a layer that the scenario names, the parts of the
            plan do not fit together, or the sum of all sites' deltas could wrap.
    """
    task = plan_task(scenario, labels)
    check_labels(task)
    targets = scenario.lora.target_modules
    if targets == "all-linear":
        targets = () if head_only else all_linear(model, task)
    lora = plan_lora(
        model,
        task,
        rank=scenario.lora.rank,
        alpha=scenario.lora.alpha,
        target_modules=() if head_only else targets,
        layers=scenario.lora.layers,
        method=scenario.lora.method,
        seed=scenario.seed,
        scaling=scenario.lora.scaling,
    )
    training = Training(
        rounds=scenario.training.rounds,
        local_steps=scenario.training.local_steps,
        expected_batch_size=scenario.training.expected_batch_size,
        optimizer=plan_optimizer(scenario),
        final_learning_rate=scenario.training.final_learning_rate,
        average_decay=scenario.training.average_decay,
    )
    drafted = drafted_aggregation(
        scenario, largest_site if scenario.aggregation.weights == "examples" else 1
    )
    privacy, aggregation = planned(scenario.privacy, drafted, training, lora, scenario.evaluation)
    plan = TrainingPlan(
        federation=scenario.name,
        job=f"{scenario.name}-head-only" if head_only else scenario.name,
        model=BaseModel(name=scenario.model.name, digest=folder_digest(model)),
        task=task,
        lora=lora,
        training=training,
        privacy=privacy,
        aggregation=aggregation,
        evaluation=scenario.evaluation,
        release_gate=None
        if scenario.release_gate is None
        else ReleaseGate(
            holdout=hashlib.sha256(holdout).digest(),
            max_loss_increase=scenario.release_gate.max_loss_increase,
        ),
    )
    plan = second_version(plan, server=scenario.server)
    check_plan(plan)
    encoding_of(plan, scenario.sites.count).prove_headroom()
    return plan


def with_start(
    plan: TrainingPlan, scenario: Scenario, titles: Mapping[str, str], model: Path
) -> tuple[TrainingPlan, Vector | None]:
    """A scenario's plan with what it starts from, and that start if it is a tensor.

    Args:
        titles: the text of each label, where the data have one.

    Raises:
        DataError, ModelError, PlanError: the start does not fit the plan.
    """
    if not isinstance(scenario.start, DraftedLabelNames):
        return plan, None
    return with_label_names(plan, model, _titled(scenario.start, plan, titles), Path())


def _titled(
    start: DraftedLabelNames, plan: TrainingPlan, titles: Mapping[str, str]
) -> DraftedLabelNames:
    task = plan.task
    if start.names is not None or not isinstance(task, Classification):
        return start
    names = tuple(titles.get(label, label) for label in task.labels)
    return msgspec.structs.replace(start, names=names)


def plan_task(scenario: Scenario, labels: tuple[str, ...]) -> Task:
    """The task of a scenario's plan."""
    task = scenario.task
    if isinstance(task, CausalLm):
        return task
    return Classification(
        labels=labels,
        max_tokens=task.max_tokens,
        head=task.head,
        logit_scale=task.logit_scale,
    )


def drafted_aggregation(scenario: Scenario, max_weight: int = 1) -> DraftAggregation:
    """The aggregation of a scenario, as a draft has it."""
    settings = scenario.aggregation
    shared = isinstance(scenario.privacy, DraftDistributed)
    return DraftAggregation(
        threshold=settings.threshold,
        clip_range=settings.clip_range or (None if shared else 1.0),
        step=settings.step or (None if shared else 1e-6),
        ring_bits=settings.ring_bits,
        weights=settings.weights,
        max_weight=max_weight,
    )


def plan_optimizer(scenario: Scenario) -> Adam | Sgd | NoOptimizer:
    """The optimizer of a scenario's plan.

    Raises:
        ConfigError: it has no learning rate.
    """
    training = scenario.training
    if training.optimizer == "none":
        return NoOptimizer()
    if training.adapter_learning_rate is None:
        raise ConfigError(
            "an optimizer needs a learning rate",
            field="training.adapter_learning_rate",
            found="no such field",
            accepted="a number, such as 1e-3",
        )
    if training.optimizer == "adam":
        return Adam(
            adapter_learning_rate=training.adapter_learning_rate,
            head_learning_rate=training.head_learning_rate,
            beta1=training.beta1,
            beta2=training.beta2,
            eps=training.eps,
            unbiased=training.unbiased,
        )
    return Sgd(
        adapter_learning_rate=training.adapter_learning_rate,
        head_learning_rate=training.head_learning_rate,
        momentum=training.momentum,
    )
