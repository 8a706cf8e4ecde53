"""The tensors in which a release can differ from the one before it, and which travel in its place.

The law: one set of tensors for both parties, a pure function of plan and round. It only saves
bytes: what is put together here is an adapter like any other that came over the network, and is
compared with the digest in its signed release before anything is done with it.
"""

from collections.abc import Sequence

from umbel_common.adapters.vector import Vector, from_bytes, size_of, to_bytes, unflatten
from umbel_common.errors import require
from umbel_common.plans.plan import Tensor, TrainingPlan


def moved_tensors(plan: TrainingPlan, round_number: int) -> tuple[Tensor, ...]:
    """The tensors that a round's release can have changed, in the order of the plan's; none for
    release 0, which has no predecessor."""
    if round_number == 0:
        return ()
    if plan.lora.method == "fedsvd":
        # Only B is trained, and then both are rotated.
        return plan.lora.tensors
    return plan.trained_tensors(round_number)


def is_smaller(plan: TrainingPlan, round_number: int) -> bool:
    """Whether the difference of a round's release is smaller than its whole adapter."""
    return size_of(moved_tensors(plan, round_number)) < plan.lora.size


def difference(plan: TrainingPlan, round_number: int, adapter: Vector) -> tuple[memoryview, ...]:
    """What a round's release changed, as it travels: one view into `adapter` for each tensor.

    Args:
        round_number: the round of the release.
        adapter: the release's adapter, float32[plan.lora.size]. It is copied only if it is not
            little-endian.
    """
    values = unflatten(adapter, plan.lora.tensors)
    return tuple(
        to_bytes(values[tensor.name].reshape(-1)) for tensor in moved_tensors(plan, round_number)
    )


def apply_difference(
    plan: TrainingPlan, round_number: int, adapter: Vector, changed: Sequence[memoryview]
) -> None:
    """Turns the adapter of a release into that of the next, in place; the inverse of `difference`.

    It replaces numbers and adds nothing to them, so doing it twice is doing it once.

    Args:
        round_number: the round of the later release.
        adapter: the adapter of the earlier one, float32[plan.lora.size], writeable.
        changed: what `difference` gave. Each view is released as soon as it is copied, and so is
            the message that it is a part of: the two need not be in memory for long.

    Raises:
        RemoteProtocolError: `adapter-length` for another number of tensors or another length of
            one; `adapter-values` for values that are not finite.
    """
    tensors = moved_tensors(plan, round_number)
    require(
        len(changed) == len(tensors),
        "adapter-length",
        "the difference of a release has the wrong number of tensors",
        found=len(changed),
        accepted=len(tensors),
    )
    values = unflatten(adapter, plan.lora.tensors)
    for tensor, piece in zip(tensors, changed, strict=True):
        values[tensor.name].reshape(-1, copy=False)[:] = from_bytes(piece, tensor.size)
        piece.release()
