"""A release's difference makes of its predecessor what the whole adapter would be."""

from collections.abc import Callable

import msgspec
import numpy as np
import pytest

from umbel_common.adapters.difference import (
    apply_difference,
    difference,
    is_smaller,
    moved_tensors,
)
from umbel_common.adapters.vector import Vector, initial_vector, merge, size_of
from umbel_common.errors import RemoteProtocolError
from umbel_common.plans.plan import TrainingPlan
from umbel_common.protocol.wire import TrainFromLastRequest, open_request, seal_request
from umbel_common.trust.identity import Identity, Signed

MakePlan = Callable[..., TrainingPlan]
METHODS = ("both", "ffa", "alternate", "fedsvd")
NOTHING = Signed(statement=b"", signature=bytes(64))


def of_method(make_plan: MakePlan, method: str) -> TrainingPlan:
    plan = make_plan()
    return msgspec.structs.replace(plan, lora=msgspec.structs.replace(plan.lora, method=method))


def after(plan: TrainingPlan, round_number: int, adapter: Vector) -> Vector:
    """An adapter in which every number that a round trains has changed."""
    size = size_of(plan.trained_tensors(round_number))
    change = np.random.default_rng(round_number).uniform(0.1, 0.2, size).astype(np.float32)
    return merge(adapter, change, plan, round_number)


def views(*pieces: bytes) -> tuple[memoryview, ...]:
    return tuple(memoryview(piece) for piece in pieces)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("round_number", [1, 2])
def test_the_difference_of_a_round_makes_its_adapter(
    make_plan: MakePlan, method: str, round_number: int
) -> None:
    plan = of_method(make_plan, method)
    before = initial_vector(plan)
    released = after(plan, round_number, before)
    changed = difference(plan, round_number, released)
    made = before.copy()
    apply_difference(plan, round_number, made, changed)
    assert np.array_equal(made, released)
    assert not np.array_equal(made, before)


def test_applied_twice_it_is_applied_once(make_plan: MakePlan) -> None:
    """A site that stored the adapter and ended before it answered is asked again."""
    plan = of_method(make_plan, "alternate")
    released = after(plan, 1, initial_vector(plan))
    made = initial_vector(plan)
    for _ in range(2):
        apply_difference(plan, 1, made, difference(plan, 1, released))
    assert np.array_equal(made, released)


def test_it_is_smaller_where_a_round_trains_a_part_of_the_adapter(make_plan: MakePlan) -> None:
    smaller = {method: is_smaller(of_method(make_plan, method), 1) for method in METHODS}
    assert smaller == {"both": False, "ffa": True, "alternate": True, "fedsvd": False}


def test_a_rotation_changes_what_no_site_trained(make_plan: MakePlan) -> None:
    plan = of_method(make_plan, "fedsvd")
    assert moved_tensors(plan, 1) == plan.lora.tensors != plan.trained_tensors(1)


def test_a_start_has_no_difference(make_plan: MakePlan) -> None:
    plan = of_method(make_plan, "both")
    assert moved_tensors(plan, 0) == ()
    assert difference(plan, 0, initial_vector(plan)) == ()


def test_a_sender_copies_nothing(make_plan: MakePlan) -> None:
    plan = of_method(make_plan, "alternate")
    adapter = initial_vector(plan)
    for piece in difference(plan, 1, adapter):
        assert np.shares_memory(np.frombuffer(piece, dtype=np.uint8), adapter)


def test_a_receiver_lets_the_message_go_as_it_takes_it(make_plan: MakePlan) -> None:
    """Otherwise a site would hold most of a second adapter while it trains."""
    plan = of_method(make_plan, "alternate")
    operator = Identity(bytes(32))
    changed = difference(plan, 1, after(plan, 1, initial_vector(plan)))
    message = TrainFromLastRequest(header=NOTHING, release=NOTHING, onto=bytes(32), changed=changed)
    # A bytearray can only be emptied while nobody looks into it.
    sealed = bytearray(seal_request(operator, "a", message))
    request = open_request(operator.public_key, "a", sealed, limit=len(sealed))
    assert isinstance(request, TrainFromLastRequest)
    with pytest.raises(BufferError):
        sealed.clear()
    apply_difference(plan, 1, initial_vector(plan), request.changed)
    sealed.clear()


@pytest.mark.parametrize(
    ("spoil", "check"),
    [
        (lambda pieces: pieces[:-1], "adapter-length"),
        (lambda pieces: (*pieces, b""), "adapter-length"),
        (lambda pieces: (*pieces[:-1], pieces[-1][:-4]), "adapter-length"),
        (lambda pieces: (*pieces[:-1], pieces[-1] + bytes(4)), "adapter-length"),
        (lambda pieces: (pieces[0] + pieces[1], *pieces[2:], b""), "adapter-length"),
        (lambda pieces: (*pieces[:-1], b"\xff" * len(pieces[-1])), "adapter-values"),
    ],
    ids=["a tensor less", "a tensor more", "shorter", "longer", "other borders", "no numbers"],
)
def test_another_shape_is_refused(
    make_plan: MakePlan, spoil: Callable[..., tuple[bytes, ...]], check: str
) -> None:
    plan = of_method(make_plan, "alternate")
    pieces = tuple(bytes(piece) for piece in difference(plan, 1, initial_vector(plan)))
    with pytest.raises(RemoteProtocolError) as refusal:
        apply_difference(plan, 1, initial_vector(plan), views(*spoil(pieces)))
    assert refusal.value.check == check
