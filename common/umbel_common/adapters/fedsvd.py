"""FedSVD (Lee et al. 2025, arXiv 2505.12805): A and B of the product B A, made again each round.

After a round has moved B, the product of each pair is divided again by its singular values,
B A = U S V: the new A is V, whose rows are orthonormal, and the new B is U S. It takes the released
tensors alone, so it costs no privacy.

Since B alone is trained, the rows of the new A are combinations of the rows of the old one: with
W the rotation between them, A becomes W A, and B becomes B W^T. The initial A of Umbel has
orthonormal rows already. So FedSVD changes no product, no subspace and no step that rotations
leave as it is: gradient descent at the server, with its momentum rotated too, gives the products of
`ffa` up to rounding.

Libraries compute singular values in different orders. So a verifier does not compare bits: it
requires that the product, and the orthonormal rows, are what they have to be within `TOLERANCE`.
A round starts from the bits that the one before released, so these tolerances could add up.
`SummedProducts` follows what all rounds together give, and holds a release to that too.
"""

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from umbel_common.adapters.server_step import Integers, ServerState, take_step
from umbel_common.adapters.vector import Vector, unflatten
from umbel_common.errors import require
from umbel_common.plans.plan import Lora, Tensor, TrainingPlan
from umbel_common.plans.server_optimizer import Average, ServerSgd

Matrix = npt.NDArray[np.float64]

TOLERANCE = 1e-5
"""Largest distance of a product from the one before it was divided, relative to it, and of the
products of A's rows from those of orthonormal ones. Rounding to float32 makes 1.4e-6 of it, for the
largest rank of 512."""


def pairs(lora: Lora) -> Iterator[tuple[Tensor, Tensor]]:
    """Each A with its B."""
    named = {tensor.name: tensor for tensor in lora.tensors}
    for tensor in lora.tensors:
        if tensor.role == "lora_A":
            yield tensor, named[tensor.name.replace("lora_A", "lora_B")]


def next_adapter(
    plan: TrainingPlan,
    round_number: int,
    total: Integers,
    weight: int,
    adapter: Vector,
    state: ServerState,
) -> None:
    """Makes the adapter that a round releases from the one that it started from, in place.

    Args:
        total, weight, adapter, state: see `server_step.take_step`.
    """
    take_step(plan, round_number, total, weight, adapter, state)
    if plan.lora.method == "fedsvd":
        refactorise(plan, adapter, state)


def refactorise(plan: TrainingPlan, adapter: Vector, state: ServerState) -> None:
    """Divides each product again, in place, and gives the state of B its new place.

    A product of zero stays as it is, with its A.

    Args:
        adapter: float32[plan.lora.size], writeable: after the step of the round.
        state: the optimizer's, after the step.
    """
    values = unflatten(adapter, plan.lora.tensors)
    for first, second in pairs(plan.lora):
        A, B = values[first.name], values[second.name]
        before = A.copy()
        if B.any():
            A[...], B[...] = _divided(A.astype(np.float64), B.astype(np.float64))
        _rotate(plan, second, before, A, state)
    _reset(plan, state)


def _divided(A: Matrix, B: Matrix) -> tuple[Matrix, Matrix]:
    """The same product with orthonormal rows in A, and the longest columns of B first."""
    # With A = L Q, and orthonormal rows in Q, only B L has to be divided.
    transposed, triangle = np.linalg.qr(A.T)
    left, values, right = np.linalg.svd(B @ triangle.T, full_matrices=False)
    rows = right @ transposed.T
    # A sign of each row is free: the largest element, the first of equal ones, is positive.
    largest = np.abs(rows).argmax(axis=1)
    signs = np.where(rows[np.arange(len(rows)), largest] < 0, -1.0, 1.0)
    return rows * signs[:, None], left * (values * signs)


def carry_state(plan: TrainingPlan, before: Vector, after: Vector, state: ServerState) -> None:
    """What `refactorise` does to the state, for a verifier that has the released matrices.

    Args:
        before, after: float32[plan.lora.size], of the release before and of this one.
        state: the optimizer's, after the step.
    """
    old = unflatten(before, plan.lora.tensors)
    new = unflatten(after, plan.lora.tensors)
    for first, second in pairs(plan.lora):
        _rotate(plan, second, old[first.name], new[first.name], state)
    _reset(plan, state)


def _rotate(
    plan: TrainingPlan, tensor: Tensor, before: Vector, after: Vector, state: ServerState
) -> None:
    """Rotates the momentum of B with A. The gradient of B is that of the product, times A^T."""
    if isinstance(plan.server, ServerSgd) and not np.array_equal(before, after):
        rotation = after.astype(np.float64) @ before.astype(np.float64).T
        momentum = state.moment("momentum", tensor)
        momentum[:] = (momentum.reshape(tensor.shape) @ rotation.T).reshape(-1)


def _reset(plan: TrainingPlan, state: ServerState) -> None:
    """Resets what adam and yogi know of B. Their second moments belong to elements, and a rotation
    mixes elements; with the first moment alone, a step could be as long as its change is short."""
    if not isinstance(plan.server, Average | ServerSgd):
        state.steps.pop("lora_B", None)
        for named in state.moments.values():
            for _, tensor in pairs(plan.lora):
                named.pop(tensor.name, None)


class SummedProducts:
    """What the steps of a job give each product, followed beside what is released.

    With the rows of the initial A orthonormal, and those of every later A in their space, each
    product is C times the initial A, for a C as large as B.
    """

    def __init__(self, plan: TrainingPlan, start: Vector) -> None:
        """Args:
        start: the adapter that the job starts from, float32[plan.lora.size].
        """
        self._plan = plan
        self._steps = 0
        self._first: dict[str, Matrix] = {}
        self._given: dict[str, Matrix] = {}
        self._longest: dict[str, float] = {}
        values = unflatten(start, plan.lora.tensors)
        for first, second in pairs(plan.lora):
            self._first[second.name] = values[first.name].astype(np.float64)
            self._given[second.name] = values[second.name].astype(np.float64)
            self._longest[second.name] = 0.0

    def require_near(self, before: Vector, moved: Vector, released: Vector) -> None:
        """Adds a round's step, and requires a release near all steps together.

        The error of n rounds that round independently grows with the root of n, and so does the
        tolerance: from a release of 100 rounds, `TOLERANCE` times 10 of the longest product so far.

        Args:
            before: float32[plan.lora.size], the release before.
            moved: the same after the step of the round.
            released: the release of the round.

        Raises:
            RemoteProtocolError: `adapter-digest`.
        """
        self._steps += 1
        old, stepped, new = (
            unflatten(vector, self._plan.lora.tensors) for vector in (before, moved, released)
        )
        for first, second in pairs(self._plan.lora):
            start, given = self._first[second.name], self._given[second.name]
            step = stepped[second.name].astype(np.float64) - old[second.name]
            given += step @ (old[first.name].astype(np.float64) @ start.T)
            longest = max(self._longest[second.name], float(np.linalg.norm(given)))
            self._longest[second.name] = longest
            rows = _triangle(np.concatenate([new[first.name].astype(np.float64), start]))
            sides = np.concatenate([new[second.name].astype(np.float64), -given], axis=1)
            _require(
                bool(np.linalg.norm(sides @ rows) <= TOLERANCE * math.sqrt(self._steps) * longest),
                second,
                "its product drifts from what the sums of all rounds give",
            )


def require_refactorised(plan: TrainingPlan, moved: Vector, released: Vector) -> None:
    """Requires that an adapter is another after its products were divided again.

    Args:
        moved: float32[plan.lora.size], after the step of the round.
        released: float32[plan.lora.size].

    Raises:
        RemoteProtocolError: `adapter-digest`.
    """
    old = unflatten(moved, plan.lora.tensors)
    new = unflatten(released, plan.lora.tensors)
    paired = list(pairs(plan.lora))
    divided = {tensor.name for pair in paired for tensor in pair}
    for tensor in plan.lora.tensors:
        _require(
            tensor.name in divided or np.array_equal(old[tensor.name], new[tensor.name]),
            tensor,
            "the sum moves it elsewhere",
        )
    for first, second in paired:
        old_A, old_B = old[first.name].astype(np.float64), old[second.name].astype(np.float64)
        new_A, new_B = new[first.name].astype(np.float64), new[second.name].astype(np.float64)
        if not old_B.any():
            same = np.array_equal(old_A, new_A) and not new_B.any()
            _require(same, first, "a product of zero stays as it is")
            continue
        lengths = np.abs(new_A @ new_A.T - np.eye(len(new_A))).max()
        _require(lengths <= TOLERANCE, first, "its rows are not orthonormal")
        # B A - B' A' = [B, -B'] [A; A'], and its norm is that of [B, -B'] L for [A; A'] = L Q.
        triangle = _triangle(np.concatenate([old_A, new_A]))
        apart = np.linalg.norm(np.concatenate([old_B, -new_B], axis=1) @ triangle)
        whole = np.linalg.norm(old_B @ _triangle(old_A))
        _require(
            bool(apart <= TOLERANCE * whole), second, "its product is not the one of the round"
        )


def _triangle(rows: Matrix) -> Matrix:
    """L of rows = L Q, with orthonormal rows in Q."""
    found: Matrix = np.linalg.qr(rows.T).R.T
    return found


def _require(holds: bool, tensor: Tensor, why: str) -> None:
    require(
        holds,
        "adapter-digest",
        f"an adapter does not follow from its round's sum: {why}",
        field=tensor.name,
    )
