"""A plan as a JSON file that people read, and that its operator signs.

The signature covers the plan's canonical encoding, which anybody can compute from the text. So what
is read and what was signed cannot differ.
"""

from typing import Any

import msgspec

from umbel_common.canonical import encode
from umbel_common.errors import PlanError
from umbel_common.plans.plan import (
    Classification,
    LocalPrivacy,
    Task,
    TrainingPlan,
    check_plan,
    standard_deviation,
)
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
    parts["model"]["digest"] = plan.model.digest.hex()
    if plan.release_gate is not None:
        parts["release_gate"]["holdout"] = plan.release_gate.holdout.hex()
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
        for name, field in (("model", "digest"), ("release_gate", "holdout")):
            part = entry.plan.get(name)
            if isinstance(part, dict) and isinstance(part.get(field), str):
                part[field] = bytes.fromhex(part[field])
        plan = msgspec.convert(entry.plan, TrainingPlan)
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
        ("task", task_text(plan.task)),
        *_label_lines(plan.task if labels else None),
        ("adapter", f"rank {lora.rank} on {targets}, {layers}; {lora.size:,} numbers"),
        ("training", f"{training.rounds} rounds of {training.local_steps} steps"),
        ("batch", f"{training.expected_batch_size} on average"),
        ("sum", f"of at least {plan.aggregation.threshold} sites, weights {weights}"),
        *_evaluation_lines(plan),
        *_gate_lines(plan),
    ]


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
    return "NONE: gradients are neither clipped nor noised"
