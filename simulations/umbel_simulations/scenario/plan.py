"""Makes the training plan of a scenario, which its operator signs."""

import hashlib
from pathlib import Path

from umbel_client.models.adapters.lora import plan_lora
from umbel_client.models.adapters.targets import all_linear
from umbel_common.plans.alike import check_labels
from umbel_common.plans.check import check_plan
from umbel_common.plans.plan import (
    Adam,
    Aggregation,
    BaseModel,
    CausalLm,
    Classification,
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
    """The plan of a scenario.

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
    plan = TrainingPlan(
        federation=scenario.name,
        job=f"{scenario.name}-head-only" if head_only else scenario.name,
        model=BaseModel(name=scenario.model.name, digest=folder_digest(model)),
        task=task,
        lora=lora,
        training=Training(
            rounds=scenario.training.rounds,
            local_steps=scenario.training.local_steps,
            expected_batch_size=scenario.training.expected_batch_size,
            optimizer=plan_optimizer(scenario),
            final_learning_rate=scenario.training.final_learning_rate,
            average_decay=scenario.training.average_decay,
        ),
        privacy=scenario.privacy,
        aggregation=Aggregation(
            threshold=scenario.aggregation.threshold,
            clip_range=scenario.aggregation.clip_range,
            step=scenario.aggregation.step,
            ring_bits=scenario.aggregation.ring_bits,
            weights=scenario.aggregation.weights,
            max_weight=largest_site if scenario.aggregation.weights == "examples" else 1,
        ),
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
    encoding_of(plan.aggregation, scenario.sites.count).prove_headroom()
    return plan


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


def plan_optimizer(scenario: Scenario) -> Adam | Sgd:
    """The optimizer of a scenario's plan."""
    training = scenario.training
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
