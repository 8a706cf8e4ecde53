"""Makes the training plan of a scenario, which its operator signs."""

from pathlib import Path

from umbel_client.models.adapters.lora import plan_lora
from umbel_client.models.adapters.targets import all_linear
from umbel_common.plans.plan import (
    Adam,
    Aggregation,
    BaseModel,
    CausalLm,
    Classification,
    Sgd,
    Task,
    Training,
    TrainingPlan,
    check_plan,
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
    head_only: bool = False,
) -> TrainingPlan:
    """The plan of a scenario.

    Args:
        largest_site: number of records of the largest site; used if record counts are the weights.
        head_only: whether to leave the adapter out, for the comparison.

    Raises:
        ModelError, PlanError: the model lacks a layer that the scenario names, the parts of the
            plan do not fit together, or the sum of all sites' deltas could wrap.
    """
    task: Task = (
        scenario.task
        if isinstance(scenario.task, CausalLm)
        else Classification(
            labels=labels,
            max_tokens=scenario.task.max_tokens,
            head=scenario.task.head,
            logit_scale=scenario.task.logit_scale,
        )
    )
    targets = () if head_only else scenario.lora.target_modules
    lora = plan_lora(
        model,
        task,
        rank=scenario.lora.rank,
        alpha=scenario.lora.alpha,
        target_modules=all_linear(model, task) if targets == "all-linear" else targets,
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
            optimizer=_optimizer(scenario),
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
    )
    check_plan(plan)
    encoding_of(plan.aggregation, scenario.sites.count).prove_headroom()
    return plan


def _optimizer(scenario: Scenario) -> Adam | Sgd:
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
