"""Which parts of a plan fit together."""

from umbel_common.errors import PlanError
from umbel_common.plans.largest_sum import largest_cohort, largest_sum
from umbel_common.plans.plan import (
    FEWEST_NOISE_BITS,
    MOST_STEPS,
    Adam,
    CausalLm,
    Classification,
    DistributedPrivacy,
    LocalPrivacy,
    NoOptimizer,
    NoPrivacy,
    Tensor,
    TrainingPlan,
    TrainingPlan2,
)
from umbel_common.plans.server_optimizer import Average
from umbel_common.plans.start import LabelNamesStart, SeedStart


def check_plan(plan: TrainingPlan) -> None:
    """Refuses a plan whose parts do not fit together. The type of each field checks its own range.

    Raises:
        PlanError: names the field.
    """
    _check_version(plan)
    _check_shared_noise(plan)
    if plan.aggregation.weights == "examples" and isinstance(plan.privacy, LocalPrivacy):
        raise PlanError(
            "example counts as weights would release an exact count beside the private delta",
            field="aggregation.weights",
            found="examples",
            accepted="equal or size-class while privacy.mode is local",
        )
    optimizer = plan.training.optimizer
    if isinstance(optimizer, Adam) and optimizer.unbiased and isinstance(plan.privacy, NoPrivacy):
        raise PlanError(
            "without differential privacy there is no noise to subtract from Adam's second moment",
            field="training.optimizer.unbiased",
            found=True,
            accepted="false unless privacy.mode is local",
        )
    if plan.evaluation is not None and plan.aggregation.weights != "equal":
        raise PlanError(
            "an evaluation sums counts, so all sites must have the same weight",
            field="aggregation.weights",
            found=plan.aggregation.weights,
            accepted="equal with an evaluation",
        )
    if plan.aggregation.weights == "equal" and plan.aggregation.max_weight != 1:
        raise PlanError(
            "with equal weights, each weight is 1",
            field="aggregation.max_weight",
            found=plan.aggregation.max_weight,
            accepted=1,
        )
    # A coordinate is rounded to whole steps, so a long step would let an adapter move by far more
    # than the clip range, which is what a site's policy bounds.
    if plan.aggregation.step > plan.aggregation.clip_range:
        raise PlanError(
            "a quantisation step is longer than the clip range",
            field="aggregation.step",
            found=plan.aggregation.step,
            accepted=f"at most clip_range = {plan.aggregation.clip_range:g}",
        )
    if isinstance(plan.task, CausalLm):
        if any(tensor.role == "head" for tensor in plan.lora.tensors):
            raise PlanError(
                "a causal language model has no head beside its adapter",
                field="lora.tensors",
                accepted="lora_A and lora_B",
            )
        if not plan.lora.target_modules:
            raise PlanError(
                "a causal language model without an adapter has nothing to train",
                field="lora.target_modules",
                found="none",
                accepted="names of linear layers, such as q_proj and v_proj",
            )
    for tensor in plan.lora.tensors:
        if not _has_rank(tensor, plan.lora.rank):
            raise PlanError(
                "a matrix of the adapter does not have the plan's rank",
                field=tensor.name,
                found=tensor.shape,
                accepted=f"({plan.lora.rank}, in) for lora_A, (out, {plan.lora.rank}) for lora_B",
            )
    _check_server(plan)
    if plan.lora.method == "fedsvd":
        _check_fedsvd(plan)
    names = [tensor.name for tensor in plan.lora.tensors]
    if not names or len(set(names)) != len(names):
        raise PlanError(
            "an adapter needs at least one tensor, and a name of its own for each",
            field="lora.tensors",
            found=f"{len(names)} names, {len(set(names))} different",
        )
    for number in plan.kinds_of_rounds:
        if not plan.trained_tensors(number):
            raise PlanError(
                "a round trains nothing",
                field="lora.method",
                found=f"{plan.lora.method}, in round {number}",
                accepted="a tensor in each round that the method does not freeze",
            )
    _check_ring(plan)
    _check_start(plan)


def _check_start(plan: TrainingPlan) -> None:
    start = plan.start
    if not isinstance(start, LabelNamesStart):
        return
    task = plan.task
    if not isinstance(task, Classification):
        raise PlanError(
            "a language model has no labels, whose names its head could start at",
            field="start",
            found="label-names",
            accepted="seed or released with a causal-lm",
        )
    if task.head != "mean-pool":
        raise PlanError(
            "a stock head reads what its pooler makes of a text, and no pretrained pooler puts a"
            " text where its label's row should be",
            field="start",
            found="label-names",
            accepted='seed or released, or task.head = "mean-pool"',
        )
    if len(start.names) != len(task.labels):
        raise PlanError(
            "a head that starts at its labels' names needs one for each label",
            field="start.names",
            found=f"{len(start.names)} names",
            accepted=f"{len(task.labels)}, in the order of task.labels",
        )


def _has_rank(tensor: Tensor, rank: int) -> bool:
    match tensor.role, tensor.shape:
        case ("lora_A", (found, _)) | ("lora_B", (_, found)):
            return found == rank
        case "head", _:
            return True
        case _:
            return False


def _check_shared_noise(plan: TrainingPlan) -> None:
    """What distributed mode is proven for: one step in each round, in a sum without weights."""
    training, privacy = plan.training, plan.privacy
    takes_steps = not isinstance(training.optimizer, NoOptimizer)
    if not isinstance(privacy, DistributedPrivacy):
        if not takes_steps:
            raise PlanError(
                "sites that send deltas need an optimizer of their own",
                field="training.optimizer",
                found="none",
                accepted="adam or sgd unless privacy.mode is distributed",
            )
        return
    aggregation = plan.aggregation
    _require_shared(
        privacy.noise_bits >= FEWEST_NOISE_BITS,
        "the noise of a site has too few steps of the grid",
        field="privacy.noise_bits",
        found=privacy.noise_bits,
        accepted=f"at least {FEWEST_NOISE_BITS}, with a finer aggregation.step",
    )
    _require_shared(
        training.local_steps == 1,
        "a second step would start from a gradient that the site's own share of the noise covers"
        " alone",
        field="training.local_steps",
        found=training.local_steps,
        accepted=1,
    )
    _require_shared(
        not takes_steps,
        "the step is the server's",
        field="training.optimizer",
        found="adam or sgd",
        accepted="none",
    )
    _require_shared(
        training.average_decay is None,
        "a site takes no steps that could be averaged",
        field="training.average_decay",
        found=training.average_decay,
        accepted="no such field",
    )
    _require_shared(
        training.final_learning_rate == 1.0,
        "the learning rate is the server's",
        field="training.final_learning_rate",
        found=training.final_learning_rate,
        accepted="1, and server.schedule instead",
    )
    _require_shared(
        not isinstance(plan.server, Average),
        "a sum of gradients needs a learning rate",
        field="server.optimizer",
        found="average",
        accepted="sgd, adam or yogi",
    )
    _require_shared(
        aggregation.weights == "equal",
        "a site with a weight would add more than its share",
        field="aggregation.weights",
        found=aggregation.weights,
        accepted="equal",
    )
    _require_shared(
        privacy.honest <= privacy.least_survivors,
        "more sites are relied on than a sum may have",
        field="privacy.honest",
        found=privacy.honest,
        accepted=f"at most least_survivors = {privacy.least_survivors}",
    )
    _require_shared(
        aggregation.threshold <= privacy.least_survivors,
        "a sum may have fewer sites than recover a secret",
        field="privacy.least_survivors",
        found=privacy.least_survivors,
        accepted=f"at least the threshold, {aggregation.threshold}",
    )
    _require_shared(
        privacy.most_attempts >= training.rounds,
        "there are fewer attempts than rounds",
        field="privacy.most_attempts",
        found=privacy.most_attempts,
        accepted=f"at least rounds = {training.rounds}",
    )
    _require_shared(
        privacy.clip_norm / aggregation.step <= MOST_STEPS,
        "the grid is finer than a gradient's numbers",
        field="aggregation.step",
        found=aggregation.step,
        accepted=f"at least {privacy.clip_norm / MOST_STEPS:.3g}",
    )


def _check_ring(plan: TrainingPlan) -> None:
    """No sum of noisy vectors may leave the ring, whatever cohort the threshold allows.

    In local mode it depends on the roster, and is proven for each cohort
    (`umbel_common.secagg.encoding`).
    """
    if not isinstance(plan.privacy, DistributedPrivacy):
        return
    aggregation = plan.aggregation
    sites = largest_cohort(aggregation.threshold)
    largest = largest_sum(plan, weight=sites, sites=sites)
    _require_shared(
        largest < 2 ** (aggregation.ring_bits - 1),
        f"a sum of {sites} sites, as many as the threshold allows, could wrap in a ring of"
        f" {aggregation.ring_bits} bits",
        field="aggregation.ring_bits",
        found=f"sums of up to {largest} steps: clipped coordinates, and the noise",
        accepted=f"less than 2^{aggregation.ring_bits - 1} steps, by a smaller clip_range, fewer"
        " noise_bits, or ring_bits 32",
    )


def _require_shared(holds: bool, why: str, *, field: str, found: object, accepted: object) -> None:
    if not holds:
        raise PlanError(
            f"sites cannot share their noise under this plan: {why}",
            field=field,
            found=found,
            accepted=accepted,
        )


def _check_server(plan: TrainingPlan) -> None:
    if isinstance(plan.server, Average):
        return
    warmup, rounds = plan.server.schedule.warmup_rounds, plan.training.rounds
    if warmup >= rounds:
        raise PlanError(
            "a warm-up is as long as the job, so its learning rate never reaches the planned one",
            field="server.schedule.warmup_rounds",
            found=warmup,
            accepted=f"less than training.rounds = {rounds}",
        )


def _check_fedsvd(plan: TrainingPlan) -> None:
    """A has orthonormal rows from the start on, and each product has as many singular values."""
    if not isinstance(plan.start, SeedStart | LabelNamesStart):
        raise PlanError(
            "the method fedsvd needs a start whose matrices A have orthonormal rows",
            field="start",
            found="released",
            accepted="seed or label-names",
        )
    names = {tensor.name for tensor in plan.lora.tensors}
    for tensor in plan.lora.tensors:
        if tensor.role == "head":
            continue
        other = "lora_B" if tensor.role == "lora_A" else "lora_A"
        if tensor.name.replace(tensor.role, other) not in names:
            raise PlanError(
                "the method fedsvd needs both matrices of each layer",
                field=tensor.name,
                accepted=f"one named {tensor.name.replace(tensor.role, other)} beside it",
            )
        if plan.lora.rank > min(tensor.shape):
            raise PlanError(
                "a rank is larger than a layer, so a product of it has fewer singular values",
                field="lora.rank",
                found=plan.lora.rank,
                accepted=f"at most {min(tensor.shape)}, for {tensor.name}",
            )


def _check_version(plan: TrainingPlan) -> None:
    """Version 1 promises nothing about what came after it: its releases do not name their sums."""
    if isinstance(plan, TrainingPlan2):
        return
    later = {
        "privacy.mode": (isinstance(plan.privacy, DistributedPrivacy), "distributed"),
        "training.optimizer": (isinstance(plan.training.optimizer, NoOptimizer), "none"),
        "lora.method": (plan.lora.method == "fedsvd", "fedsvd"),
    }
    for field, (found, name) in later.items():
        if found:
            raise PlanError(
                "a plan of version 1 names what only version 2 has",
                field=field,
                found=name,
                remedy="make the plan again with `umbel-server plan new`",
            )
