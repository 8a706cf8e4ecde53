"""A plan as a JSON file that people read, and that its operator signs.

The signature covers the plan's canonical encoding, which anybody can compute from the text. So what
is read and what was signed cannot differ.
"""

from collections.abc import Iterator
from typing import Any

import msgspec

from umbel_common.canonical import encode
from umbel_common.errors import PlanError
from umbel_common.plans.check import check_plan
from umbel_common.plans.plan import (
    Classification,
    DistributedPrivacy,
    LocalPrivacy,
    Task,
    TrainingPlan,
    TrainingPlan2,
    standard_deviation,
)
from umbel_common.plans.server_optimizer import Average, ServerOptimizer, ServerSgd
from umbel_common.plans.start import LabelNamesStart, ReleasedStart
from umbel_common.printable import printable_json
from umbel_common.single_keys import decode_document
from umbel_common.trust.identity import SIGNATURE_BYTES, Signed

_SHOWN = 10
"""Labels that the line about a plan's task names."""


class _PlanEntry(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    plan: dict[str, Any]
    signature: str | None = None
    not_tried: bool = False
    """Beside the plan, which is signed and has no such field."""


def plan_to_json(
    plan: TrainingPlan, signature: bytes | None = None, *, not_tried: bool = False
) -> str:
    """A plan as indented JSON with a newline at its end; digest and signature in hexadecimal.

    Args:
        not_tried: whether the plan was made without loading its base model; see `is_not_tried`.
    """
    parts = msgspec.to_builtins(plan, builtin_types=(bytes,))
    for part, field in _digests(parts):
        if isinstance(part[field], bytes):
            part[field] = part[field].hex()
    entry = _PlanEntry(parts, None if signature is None else signature.hex(), not_tried)
    text = msgspec.json.format(msgspec.json.encode(entry), indent=2).decode("utf-8")
    return printable_json(text) + "\n"


def plan_from_json(text: str, file: object) -> tuple[TrainingPlan, Signed | None]:
    """Reads what `plan_to_json` wrote, without a check of the signature.

    Args:
        file: where the text came from, for errors.

    Raises:
        PlanError: the text is not JSON, a field is unknown, missing or wrong, or parts do not fit
            together.
    """
    try:
        entry = decode_document(text, _PlanEntry)
        for part, field in _digests(entry.plan):
            if isinstance(part[field], str):
                part[field] = bytes.fromhex(part[field])
        later = entry.plan.get("version") == 2
        plan = msgspec.convert(entry.plan, TrainingPlan2 if later else TrainingPlan)
        signature = None if entry.signature is None else bytes.fromhex(entry.signature)
        if signature is not None and len(signature) != SIGNATURE_BYTES:
            raise ValueError(f"a signature has {2 * SIGNATURE_BYTES} hexadecimal digits")
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise PlanError(
            "a plan file is malformed",
            file=file,
            found=str(error).replace("`$.", "`"),
            remedy="make it with `umbel-server plan new`",
        ) from None
    check_plan(plan)
    return plan, None if signature is None else Signed(encode(plan), signature)


def _digests(plan: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """The digests in a plan, each as the table that it is in, and its field there."""
    places = {
        "model": ["digest"],
        "release_gate": ["holdout"],
        "start": ["tensor", "adapter", "plan"],
    }
    for name, fields in places.items():
        part = plan.get(name)
        if isinstance(part, dict):
            yield from ((part, field) for field in fields if field in part)


def is_not_tried(text: str) -> bool:
    """Whether the text of a plan's file, which `plan_from_json` read, says that nobody has loaded
    the plan's base model. It is a note to the operator, whom it warns before a signature."""
    return msgspec.json.decode(text, type=_PlanEntry).not_tried


def plan_lines(plan: TrainingPlan, *, labels: bool = False) -> list[tuple[str, str]]:
    """A plan for the person who decides about it, as pairs of a name and a value.

    Args:
        labels: whether all labels are in it, each on a line, and not only the first ones.
    """
    training, lora = plan.training, plan.lora
    targets = ", ".join(lora.target_modules) or "the head only"
    layers = "all layers" if lora.layers is None else f"layers {', '.join(map(str, lora.layers))}"
    weights = plan.aggregation.weights
    return [
        ("federation", plan.federation),
        ("job", plan.job),
        ("digest", plan.digest().hex()),
        ("base model", plan.model.name),
        ("", plan.model.digest.hex()),
        ("privacy", privacy_text(plan)),
        *_attempt_lines(plan),
        ("task", task_text(plan.task)),
        *_label_lines(plan.task if labels else None),
        ("adapter", f"rank {lora.rank} on {targets}, {layers}; {lora.size:,} numbers"),
        *_start_lines(plan),
        ("training", f"{training.rounds} rounds of {training.local_steps} steps"),
        *_server_lines(plan.server),
        ("batch", f"{training.expected_batch_size} on average"),
        ("sum", f"of at least {plan.aggregation.threshold} sites, weights {weights}"),
        *_evaluation_lines(plan),
        *_gate_lines(plan),
    ]


def _start_lines(plan: TrainingPlan) -> list[tuple[str, str]]:
    match plan.start:
        case LabelNamesStart() as start:
            assert isinstance(plan.task, Classification)  # `check_plan` refuses any other
            own = start.names == plan.task.labels
            what = "the labels" if own else "these names of the labels"
            lines = [
                (
                    "starts from",
                    f"the embeddings of {what}, of length {start.scale:g},"
                    f" within {start.tolerance:g} of what a site computes",
                ),
                ("", start.tensor.hex()),
            ]
            return lines if own else [*lines, ("", "; ".join(start.names))]
        case ReleasedStart() as start:
            return [
                ("starts from", f"the adapter that round {start.round} of an earlier job released"),
                ("", start.adapter.hex()),
                ("its plan", start.plan.hex()),
                ("its norm", f"at most {start.largest_norm:g}"),
            ]
    return []


def _attempt_lines(plan: TrainingPlan) -> list[tuple[str, str]]:
    privacy = plan.privacy
    if not isinstance(privacy, DistributedPrivacy):
        return []
    return [
        (
            "attempts",
            f"at most {privacy.most_attempts}, each with a new batch at sampling rate"
            f" {privacy.sampling_rate:g}, summed over at least {privacy.least_survivors} sites",
        )
    ]


def _server_lines(server: ServerOptimizer) -> list[tuple[str, str]]:
    """The step at the server; nothing where the mean of the deltas is the step."""
    if isinstance(server, Average):
        return []
    head, schedule = server.head_learning_rate, server.schedule
    rates = f"learning rate {server.adapter_learning_rate:g}"
    if head is not None:
        rates += f" ({head:g} for the head)"
    if schedule.warmup_rounds:
        rates += f", rising over {schedule.warmup_rounds} rounds"
    if schedule.final < 1:
        curve = "in a line" if schedule.decay == "linear" else "on a cosine"
        rates += f", falling {curve} to {schedule.final:g} of it"
    return [("server", f"{server_text(server)}, {rates}")]


def server_text(server: ServerOptimizer) -> str:
    """The optimizer of the server in a few words."""
    if isinstance(server, Average):
        return "the mean of the deltas"
    if isinstance(server, ServerSgd):
        nesterov = "Nesterov's " if server.nesterov else ""
        return f"gradient descent with {nesterov}momentum {server.momentum:g}"
    name = str(server.__struct_config__.tag).capitalize()
    return f"{name} with beta {server.beta1:g} and {server.beta2:g}, eps {server.eps:g}"


def _label_lines(task: Task | None) -> list[tuple[str, str]]:
    if not isinstance(task, Classification):
        return []
    return [("" if number else "labels", label) for number, label in enumerate(task.labels)]


def _evaluation_lines(plan: TrainingPlan) -> list[tuple[str, str]]:
    if plan.evaluation is None:
        return []
    noise = standard_deviation(plan.evaluation)
    return [("counted", f"held-out records and their score, in each round, noise {noise:.3g}")]


def _gate_lines(plan: TrainingPlan) -> list[tuple[str, str]]:
    gate = plan.release_gate
    if gate is None:
        return []
    return [
        ("released", f"if the loss on public records rises by {gate.max_loss_increase:g} at most"),
        ("", gate.holdout.hex()),
    ]


def task_text(task: Task) -> str:
    """The task in a few words."""
    if isinstance(task, Classification):
        first, count = ", ".join(task.labels[:_SHOWN]), len(task.labels)
        more = f" and {count - _SHOWN} more" if count > _SHOWN else ""
        return f"classification: {count} labels, {first}{more}"
    what = "answers" if task.loss_on == "answer" else "whole texts"
    return f"causal-lm: {what}, {task.template} template, up to {task.max_tokens} tokens"


def privacy_text(plan: TrainingPlan) -> str:
    """The plan's promise in a few words."""
    privacy = plan.privacy
    if isinstance(privacy, LocalPrivacy):
        return f"epsilon {privacy.epsilon:g} at delta {privacy.delta:g}"
    if isinstance(privacy, DistributedPrivacy):
        return (
            f"epsilon {privacy.epsilon:g} at delta {privacy.delta:g} against readers of the sums,"
            f" while {privacy.honest} of at least {privacy.least_survivors} sites in each keep"
            " their noise secret; more against everybody"
        )
    return "NONE: gradients are neither clipped nor noised"
