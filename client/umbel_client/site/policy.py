"""The site's own policy, judged before its data is touched. What it does not allow is refused.

This module is part of the core of the privacy guarantee. Never add a default that allows more than
before, and never take a server's word for what is judged here.

Differencing: a server that learns the sum over a set of sites, and the sum over the same set
without one site, knows the delta of that site. Two rules apply to the survivor sets that this site
itself confirmed.

- Within a round, a site confirms one set, and a set needs `threshold` of its own sites. By
  counting, no combination of a round's sums is one site's delta alone, though it can be the
  difference of two (if each attempt asks only sites that do not know the other set). With
  differential privacy the guarantee would cover the delta itself; the server is promised the sum
  and not the delta all the same.
- Without differential privacy, over all rounds and jobs: a set is one that was confirmed before, or
  differs from each such set by `minimum_cohort_difference` sites. This is a hurdle and not a
  guarantee: rounds differ, so their sums do not subtract exactly (unless every record is in every
  batch), but they come close, and several sets together get around any such number. A site that
  needs more than a hurdle needs differential privacy.
"""

import math
from collections.abc import Collection, Sequence
from datetime import time
from typing import Annotated, Literal

import msgspec

from umbel_common.adapters.reach import longest_step
from umbel_common.canonical import Value
from umbel_common.errors import PolicyRefusal
from umbel_common.plans.plan import (
    CausalLm,
    Classification,
    DistributedPrivacy,
    LossOn,
    NoPrivacy,
    Template,
    TooLong,
    TrainingPlan,
)
from umbel_common.plans.ranges import Count, Fraction, Positive, Scale
from umbel_common.plans.start import LabelNamesStart, StartName, name_of
from umbel_common.plans.statements import RoundHeader
from umbel_common.printable import is_printable
from umbel_common.secagg.messages import Preparation

_LONGEST_NAME = 256

Hours = Annotated[
    str,
    msgspec.Meta(
        pattern=r"^([01][0-9]|2[0-3]):[0-5][0-9]-([01][0-9]|2[0-3]):[0-5][0-9]\Z",
        description='two times of a day in quotes, such as "22:00-06:00"',
    ),
]
"""A span of the day, which may pass midnight: its first minute, and the first minute after it."""

HexDigest = Annotated[
    str,
    msgspec.Meta(
        pattern=r"^[0-9a-f]{64}\Z",
        description="64 hexadecimal digits in quotes, with small letters: the whole digest",
    ),
]
"""A SHA-256 digest in lower-case hexadecimal."""

TaskName = Literal["classification", "causal-lm"]


class Budget(Value, frozen=True):
    """The most that all releases from one data set may cost together; epsilon may be infinite."""

    epsilon: float
    """Against everybody."""
    delta: float
    shared: float | None = None
    """Epsilon against readers of the sums; None: the policy names none, so no sum may be released
    whose noise sites share."""


class Policy(Value, frozen=True):
    """The `[policy]` table of client.toml."""

    models: tuple[HexDigest, ...] = ()
    """Digests of the base models that may be fine-tuned here; empty: every plan is refused."""
    labels: tuple[str, ...] = ()
    """The labels of a classification, in the plan's order; a plan must name exactly these. A site
    that compared a plan's labels with its data would answer questions about its data."""
    tasks: tuple[TaskName, ...] = ("classification",)
    """Tasks that plans may have; a language model that writes text must be allowed by name."""
    max_tokens: tuple[Annotated[int, msgspec.Meta(ge=4, le=131_072)], ...] | None = None
    """The values of `task.max_tokens` that plans may have: after how many tokens a record is cut,
    or left out. Absent: any that the model can read. As with the labels, what a plan may choose is
    fixed here, and not found out from the data."""
    templates: tuple[Template, ...] = ("chat", "plain")
    """The values of `task.template` that plans for a language model may have."""
    loss_on: tuple[LossOn, ...] = ("answer", "all")
    """The values of `task.loss_on` that they may have."""
    too_long: tuple[TooLong, ...] = ("refuse", "truncate")
    """The values of `task.too_long` that they may have: whether a record of more than
    `max_tokens` is left out (`refuse`) or cut (`truncate`)."""
    operators: tuple[str, ...] = ()
    """Fingerprints of the operators that this site works for; empty: the operator of the roster
    that its people pinned."""
    approval: Literal["each-plan", "none"] = "each-plan"
    """`each-plan`: a plan runs only after a person approved it here (`umbel-client approve`).
    `none`: every plan that the rest of this policy allows may run."""
    max_rank: Count = 16
    """Largest LoRA rank."""
    target_modules: tuple[str, ...] | None = None
    """Names of the layers that may have an adapter; absent: every linear layer."""
    starts: tuple[StartName, ...] = ("seed",)
    """What plans may start from. `seed`: the plan's public seed. `label-names`: a head at the
    embeddings of its labels' names, which this site computes again. `released`: an adapter that an
    earlier job gave this site, which has trained in that job, or see `max_unknown_start_norm`."""
    max_start_scale: Scale = 10.0
    """Largest length of a label's row of a head that starts at its labels' names."""
    max_start_tolerance: Annotated[float, msgspec.Meta(gt=0, le=0.1)] = 0.02
    """Largest tolerance of a plan for the distance between such a row and the one that this site
    computes, as a share of its length."""
    max_unknown_start_norm: Positive | None = None
    """Largest Euclidean norm (`start.largest_norm`) of an earlier adapter that a plan may start
    from although this site does not have it; absent: only from adapters that this site has."""
    max_clip_range: Positive = 1.0
    """Largest clip range: how far one round may move each number of the adapter. With an optimizer
    at the server, the longest step that it can take; in distributed mode, that by a mean of
    gradients at the clip norm, or by what one site may send or adds as noise, if that is more."""
    max_rounds: Count = 100
    """Most rounds of one plan."""
    max_local_steps: Count = 100
    """Most optimizer steps of one round."""
    max_hours: Annotated[float, msgspec.Meta(gt=0, le=10_000)] = 24.0
    """Most hours that this site trains for one plan, all rounds and attempts together."""
    allowed_hours: Hours | None = None
    """When a round may begin, by this machine's clock, such as "20:00-06:00"; absent: always."""
    max_epsilon: Positive = 3.0
    """Largest epsilon of one plan against everybody: all other parties together. In distributed
    mode, this is as if all other sites told their noise."""
    total_epsilon: Positive = 3.0
    """Largest epsilon of everything ever released from the data set, over all jobs, composed at
    `max_delta`, against everybody."""
    max_shared_epsilon: Positive | None = None
    """Largest claim of one plan of distributed mode: its epsilon against readers of the sums, who
    do not know the noise of the plan's honest sites. Absent: no such plan may run."""
    total_shared_epsilon: Positive | None = None
    """Largest epsilon of everything ever released from the data set, over all jobs of either mode,
    against readers of the sums. Absent: no plan of distributed mode may run."""
    max_delta: Fraction = 1e-5
    """Largest delta of one plan; 1 / (10 x records) is another limit."""
    allow_without_privacy: bool = False
    """Whether plans without differential privacy may run. After the first round of such a plan the
    data set's epsilon is infinite, and plans with differential privacy are refused for good."""
    minimum_cohort: Annotated[int, msgspec.Meta(ge=2, le=100)] = 3
    """Fewest sites that may be summed, this one included."""
    colluding_sites: Annotated[int, msgspec.Meta(ge=0, le=100)] = 1
    """Number of sites that may secretly work with the server: the threshold t of a cohort of n must
    satisfy 2 t > n + this number. In distributed mode, they may tell their noise: the plan's honest
    sites and this number are at most the fewest survivors of a sum."""
    minimum_cohort_difference: Annotated[int, msgspec.Meta(ge=1, le=100)] = 2
    """Without differential privacy: number of sites by which a survivor set must differ from every
    other set that this site ever confirmed; 1 allows any."""
    federated_evaluation: bool = False
    """Whether the masked sum may contain noisy counts of the records that this site holds out, and
    of how an adapter does on them; they are charged to the ledger beside the training."""
    examples_as_weights: bool = False
    """Whether the exact number of records may be this site's (masked) weight; never with
    differential privacy."""

    def budget(self, plan: TrainingPlan) -> Budget:
        """The budget for `plan` in the ledger; infinite for an allowed plan without privacy."""
        if self.allow_without_privacy and isinstance(plan.privacy, NoPrivacy):
            return Budget(math.inf, self.max_delta)
        return Budget(self.total_epsilon, self.max_delta, self.total_shared_epsilon)


def judge_plan(policy: Policy, plan: TrainingPlan) -> None:
    """Refuses a plan that the policy does not allow.

    Raises:
        PolicyRefusal: `model-not-allowed`, `model-name`, `task-not-allowed`, `rank-too-large`,
            `targets-not-allowed`, `clip-range-too-large`, `too-many-rounds`,
            `too-many-local-steps`, `privacy-required`, `epsilon-too-large`, `delta-too-large`,
            `distributed-not-allowed`, `claim-too-large`, `too-many-honest`,
            `survivors-below-minimum`, `start-not-allowed`, `start-scale-too-large`,
            `start-tolerance-too-large`, `evaluation-not-allowed`, `example-weights`,
            `labels-not-allowed`, `max-tokens-not-allowed`, `template-not-allowed`,
            `loss-not-allowed`, `too-long-not-allowed` or `threshold-below-minimum`.
    """
    privacy = plan.privacy
    _require(
        plan.model.digest.hex() in policy.models,
        "model-not-allowed",
        field="policy.models",
        found=f"{plan.model.digest.hex()} ({plan.model.name})",
        accepted=", ".join(policy.models) or "none",
    )
    # A text that the plan's author chose, and that this site's people and logs show.
    _require(
        len(plan.model.name) <= _LONGEST_NAME and is_printable(plan.model.name),
        "model-name",
        field="model.name",
        found=plan.model.name[:_LONGEST_NAME],
        accepted=f"at most {_LONGEST_NAME} characters, all of them printable",
        remedy="ask the operator for a plan with another name for the same model",
    )
    task = plan.task.__struct_config__.tag
    _require(
        task in policy.tasks,
        "task-not-allowed",
        field="policy.tasks",
        found=task,
        accepted=", ".join(policy.tasks) or "none",
    )
    if isinstance(plan.task, Classification):
        _require(
            plan.task.labels == policy.labels,
            "labels-not-allowed",
            field="policy.labels",
            found=", ".join(plan.task.labels),
            accepted=", ".join(policy.labels) or "none",
        )
    if policy.max_tokens is not None:
        _one_of(policy.max_tokens, plan.task.max_tokens, "max-tokens-not-allowed", "max_tokens")
    if isinstance(plan.task, CausalLm):
        _one_of(policy.templates, plan.task.template, "template-not-allowed", "templates")
        _one_of(policy.loss_on, plan.task.loss_on, "loss-not-allowed", "loss_on")
        _one_of(policy.too_long, plan.task.too_long, "too-long-not-allowed", "too_long")
    _at_most(policy.max_rank, plan.lora.rank, "rank-too-large", "max_rank")
    _require(
        policy.target_modules is None
        or all(_covered(target, policy.target_modules) for target in plan.lora.target_modules),
        "targets-not-allowed",
        field="policy.target_modules",
        found=", ".join(plan.lora.target_modules),
        accepted=", ".join(policy.target_modules or ()),
    )
    _one_of(policy.starts, name_of(plan.start), "start-not-allowed", "starts")
    if isinstance(plan.start, LabelNamesStart):
        _at_most(
            policy.max_start_scale, plan.start.scale, "start-scale-too-large", "max_start_scale"
        )
        _at_most(
            policy.max_start_tolerance,
            plan.start.tolerance,
            "start-tolerance-too-large",
            "max_start_tolerance",
        )
    _at_most(policy.max_clip_range, longest_step(plan), "clip-range-too-large", "max_clip_range")
    _at_most(policy.max_rounds, plan.training.rounds, "too-many-rounds", "max_rounds")
    _at_most(
        policy.max_local_steps, plan.training.local_steps, "too-many-local-steps", "max_local_steps"
    )
    if isinstance(privacy, NoPrivacy):
        _require(
            policy.allow_without_privacy,
            "privacy-required",
            field="policy.allow_without_privacy",
            found="a plan without differential privacy",
            accepted="plans with privacy.mode local",
        )
    elif isinstance(privacy, DistributedPrivacy):
        _judge_shared_noise(policy, privacy)
    else:
        _at_most(policy.max_epsilon, privacy.epsilon, "epsilon-too-large", "max_epsilon")
        _at_most(policy.max_delta, privacy.delta, "delta-too-large", "max_delta")
    # A site that is not asked to confirm the survivors cannot count them. It can rely on this: no
    # set is unmasked that fewer than `threshold` of its own sites signed.
    _require(
        plan.aggregation.threshold >= policy.minimum_cohort,
        "threshold-below-minimum",
        field="policy.minimum_cohort",
        found=f"threshold {plan.aggregation.threshold}",
        accepted=f"at least {policy.minimum_cohort}",
    )
    _require(
        plan.evaluation is None or policy.federated_evaluation,
        "evaluation-not-allowed",
        field="policy.federated_evaluation",
        found="a plan with a federated evaluation",
        accepted="plans without",
    )
    _require(
        plan.aggregation.weights != "examples" or policy.examples_as_weights,
        "example-weights",
        field="policy.examples_as_weights",
        found="weights by number of records",
        accepted="equal or size-class",
    )


def _judge_shared_noise(policy: Policy, privacy: DistributedPrivacy) -> None:
    """Judges what a plan of distributed mode says. What it costs against everybody, and whether its
    claim is true, is computed beside this (`umbel_client.privacy.attempt_cost.judge_cost`)."""
    for field in ("max_shared_epsilon", "total_shared_epsilon"):
        _require(
            getattr(policy, field) is not None,
            "distributed-not-allowed",
            field=f"policy.{field}",
            found="a plan with privacy.mode distributed, and a policy that does not name it",
            accepted="plans with privacy.mode local",
            remedy=f"agree on a plan of local mode, or write {field} into this site's policy, after"
            " you have read who is protected against whom (docs/privacy.md)",
        )
    _at_most(
        policy.max_shared_epsilon or 0.0, privacy.epsilon, "claim-too-large", "max_shared_epsilon"
    )
    _at_most(policy.max_delta, privacy.delta, "delta-too-large", "max_delta")
    _require(
        privacy.honest <= privacy.least_survivors - policy.colluding_sites,
        "too-many-honest",
        field="policy.colluding_sites",
        found=f"{privacy.honest} honest sites of at least {privacy.least_survivors} in a sum",
        accepted=f"at most {privacy.least_survivors - policy.colluding_sites}: the fewest survivors"
        f" without {policy.colluding_sites} that may tell their noise",
    )
    _require(
        privacy.least_survivors >= policy.minimum_cohort,
        "survivors-below-minimum",
        field="policy.minimum_cohort",
        found=f"sums of {privacy.least_survivors} sites",
        accepted=f"at least {policy.minimum_cohort}",
    )


def judge_unknown_start(policy: Policy, largest_norm: float) -> None:
    """Refuses a plan that starts from an earlier adapter which this site does not have.

    Args:
        largest_norm: the plan's bound of the adapter's Euclidean norm.

    Raises:
        PolicyRefusal: `start-unknown`.
    """
    allowed = policy.max_unknown_start_norm
    _require(
        allowed is not None and largest_norm <= allowed,
        "start-unknown",
        field="policy.max_unknown_start_norm",
        found=f"an adapter that this site does not have, of norm {largest_norm:g} at most",
        accepted="adapters that earlier jobs gave this site"
        if allowed is None
        else f"norms of at most {allowed:g}",
    )


def as_asked(policy: Policy, plan: TrainingPlan) -> Policy:
    """The policy by which a plan is judged before people are asked about it.

    Where people approve each plan, and the policy names no labels, those of the plan are what they
    are asked about (`umbel_client.site.policy_file`). Nothing runs before the policy names them.
    """
    asks = policy.approval == "each-plan" and not policy.labels
    if asks and isinstance(plan.task, Classification):
        return msgspec.structs.replace(policy, labels=plan.task.labels)
    return policy


def judge_operator(policy: Policy, operator: str) -> None:
    """Refuses to work for an operator that the policy does not name.

    Args:
        operator: fingerprint of the pinned operator.

    Raises:
        PolicyRefusal: `operator-not-allowed`.
    """
    _require(
        not policy.operators or operator in policy.operators,
        "operator-not-allowed",
        field="policy.operators",
        found=operator,
        accepted=", ".join(policy.operators),
        remedy="compare fingerprints with the operator, then change the roster or this policy",
    )


def judge_start(policy: Policy, moment: time, seconds: float) -> None:
    """Refuses to train now, or any longer.

    Args:
        moment: time of day, by this machine's clock.
        seconds: how long this site has trained for the plan.

    Raises:
        PolicyRefusal: `outside-hours` or `too-many-hours`.
    """
    if policy.allowed_hours is not None:
        first, end = map(time.fromisoformat, policy.allowed_hours.split("-"))
        inside = first <= moment < end if first < end else moment >= first or moment < end
        _require(
            inside,
            "outside-hours",
            field="policy.allowed_hours",
            found=moment.strftime("%H:%M"),
            accepted=policy.allowed_hours,
            remedy="nothing: the server asks again",
        )
    _require(
        seconds < policy.max_hours * 3600,
        "too-many-hours",
        field="policy.max_hours",
        found=f"{seconds / 3600:.1f} hours of training for this plan",
        accepted=f"less than {policy.max_hours:g}",
    )


def judge_header(policy: Policy, plan: TrainingPlan, header: RoundHeader | Preparation) -> None:
    """Refuses an attempt, or one that is to be prepared, whose cohort the policy does not allow.

    Raises:
        PolicyRefusal: `cohort-too-small`, `threshold-too-high` or `threshold-too-low`.
    """
    sites = len(header.cohort)
    _require(
        sites >= policy.minimum_cohort,
        "cohort-too-small",
        field="policy.minimum_cohort",
        found=f"{sites} sites",
        accepted=f"at least {policy.minimum_cohort}",
    )
    _require(
        sites >= plan.least_survivors or plan.least_survivors == plan.aggregation.threshold,
        "cohort-too-small",
        field="privacy.least_survivors",
        found=f"{sites} sites",
        accepted=f"at least {plan.least_survivors}",
        remedy="nothing: the server asks again with more sites",
    )
    threshold = plan.aggregation.threshold
    _require(
        threshold <= sites,
        "threshold-too-high",
        field="aggregation.threshold",
        found=f"threshold {threshold} for {sites} sites",
        accepted=f"at most {sites}",
        remedy="nothing: the server asks again with a cohort that can reach the threshold",
    )
    # Two survivor sets that both gather t signatures then share an honest signer.
    _require(
        2 * threshold > sites + policy.colluding_sites,
        "threshold-too-low",
        field="policy.colluding_sites",
        found=f"threshold {threshold} for {sites} sites",
        accepted=f"at least {(sites + policy.colluding_sites) // 2 + 1}",
    )


def judge_survivors(
    policy: Policy,
    plan: TrainingPlan,
    survivors: tuple[str, ...],
    *,
    same_round: Sequence[tuple[str, ...]],
    ever: Sequence[tuple[str, ...]],
) -> None:
    """Refuses a sum that would single out a site, beside a sum that this site confirmed before; and
    one with fewer shares of the noise than the plan of distributed mode says.

    Args:
        same_round: the survivor sets that this site confirmed in earlier attempts of the round.
        ever: the survivor sets that it confirmed in any round of any job.

    Raises:
        PolicyRefusal: `survivors-below-plan`; `survivors-differ` within a round;
            `cohort-difference` between rounds, without differential privacy.
    """
    if isinstance(plan.privacy, DistributedPrivacy):
        _require(
            len(set(survivors)) >= plan.privacy.least_survivors,
            "survivors-below-plan",
            field="privacy.least_survivors",
            found=f"{len(set(survivors))} sites",
            accepted=f"at least {plan.privacy.least_survivors}",
            remedy="nothing: the noise of so few sites is less than the plan promises",
        )
        # Each attempt has a batch and noise of its own, and is charged: the sums of two attempts
        # over two sets tell no more than that.
        return
    for earlier in same_round:
        _require(
            set(earlier) == set(survivors),
            "survivors-differ",
            found=", ".join(survivors),
            accepted=f"as confirmed before: {', '.join(earlier)}",
            remedy="nothing within this round: another sum would single out a site",
        )
    if not isinstance(plan.privacy, NoPrivacy):
        return
    for earlier in ever:
        difference = len(set(survivors) ^ set(earlier))
        _require(
            difference == 0 or difference >= policy.minimum_cohort_difference,
            "cohort-difference",
            field="policy.minimum_cohort_difference",
            found=f"{difference} sites differ from a set that was confirmed before",
            accepted=f"none, or at least {policy.minimum_cohort_difference}",
        )


def _covered(target: str, allowed: Collection[str]) -> bool:
    """Whether a target, which may name a layer's owners too, is one of the names allowed."""
    return any(target == name or target.endswith(f".{name}") for name in allowed)


def _at_most(limit: float, found: float, check: str, field: str) -> None:
    # This comparison refuses a NaN too.
    _require(
        found <= limit, check, field=f"policy.{field}", found=found, accepted=f"at most {limit:g}"
    )


def _one_of(allowed: Sequence[object], found: object, check: str, field: str) -> None:
    _require(
        found in allowed,
        check,
        field=f"policy.{field}",
        found=found,
        accepted=", ".join(map(str, allowed)) or "none",
    )


def _require(condition: bool, check: str, **details: object) -> None:
    if not condition:
        details.setdefault("remedy", "agree on another plan, or change this site's policy")
        raise PolicyRefusal(
            check, f"this site's policy refuses: {check.replace('-', ' ')}", **details
        )
