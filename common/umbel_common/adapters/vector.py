"""The adapter as a flat vector, and its public initial value.

The law: this vector is hashed, and its digest is signed: no order, type or rounding of it ever
changes, and no library's generator draws its initial value.

The vector has the plan's tensors one after the other, as row-major float32. This vector is what is
hashed, summed and released.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from umbel_common.canonical import digest
from umbel_common.errors import PlanError, require
from umbel_common.plans.plan import Classification, Tensor, TrainingPlan

Vector: TypeAlias = npt.NDArray[np.float32]

_CHUNK = 2**16
"""Number of elements that are checked together, since the check makes a byte for each."""


def size_of(tensors: Sequence[Tensor]) -> int:
    """Number of elements of the vector of `tensors`."""
    return sum(tensor.size for tensor in tensors)


def flatten(values: Mapping[str, npt.NDArray[Any]], tensors: Sequence[Tensor]) -> Vector:
    """The float32 vector of `tensors`, in their order.

    Raises:
        PlanError: a tensor is missing, or has another shape than in the plan.
    """
    vector = np.empty(size_of(tensors), dtype=np.float32)
    start = 0
    for tensor in tensors:
        value = values.get(tensor.name)
        if value is None or value.shape != tensor.shape:
            raise PlanError(
                "a tensor of the adapter is not as planned",
                field=tensor.name,
                found="missing" if value is None else value.shape,
                accepted=tensor.shape,
            )
        vector[start : start + tensor.size] = value.reshape(-1)
        start += tensor.size
    return vector


def unflatten(vector: Vector, tensors: Sequence[Tensor]) -> dict[str, Vector]:
    """Views into `vector` by tensor name, each in its shape; the inverse of `flatten`.

    Raises:
        PlanError: the vector has another length than the tensors together.
    """
    if vector.shape != (size_of(tensors),):
        raise PlanError(
            "an adapter vector has the wrong length",
            found=vector.shape,
            accepted=(size_of(tensors),),
        )
    values = {}
    start = 0
    for tensor in tensors:
        values[tensor.name] = vector[start : start + tensor.size].reshape(tensor.shape)
        start += tensor.size
    return values


def merge(vector: Vector, delta: Vector, plan: TrainingPlan, round_number: int) -> Vector:
    """The whole adapter with `delta` added, which covers only the tensors of the round."""
    merged = vector.copy()
    values = unflatten(merged, plan.lora.tensors)
    for name, change in unflatten(delta, plan.trained_tensors(round_number)).items():
        values[name] += change
    return merged


def adapter_digest(plan_digest: bytes, vector: Vector) -> bytes:
    """The content address of an adapter: its values under the plan that gives them meaning."""
    return digest("adapter", plan_digest, to_bytes(vector))


def start_digest(vector: Vector) -> bytes:
    """The digest by which a plan names the public tensor that it starts from, 32 bytes. Unlike
    `adapter_digest`, it does not depend on the plan."""
    return digest("start", to_bytes(vector))


def to_bytes(vector: Vector) -> memoryview:
    """A vector as it travels, float32 little-endian; copied only if it is not that already."""
    return np.ascontiguousarray(vector, dtype="<f4").view(np.uint8).data


def from_bytes(data: bytes | memoryview, length: int) -> Vector:
    """The inverse of `to_bytes`; the result is read-only, and not copied.

    Raises:
        RemoteProtocolError: `adapter-length`, or `adapter-values` for one that is not finite.
    """
    require(
        len(data) == 4 * length,
        "adapter-length",
        "an adapter has the wrong length",
        found=f"{len(data)} bytes",
        accepted=f"{4 * length} bytes",
    )
    vector = np.frombuffer(data, dtype="<f4").astype(np.float32, copy=False)
    vector.flags.writeable = False
    require(
        all(
            np.isfinite(vector[start : start + _CHUNK]).all() for start in range(0, length, _CHUNK)
        ),
        "adapter-values",
        "an adapter has values that are not finite",
    )
    return vector


def initial_vector(plan: TrainingPlan) -> Vector:
    """The adapter that every party computes for itself before the first round.

    A has orthonormal rows (or columns, where the rank exceeds the input). B is zero, so the model
    starts unchanged. A mean-pool head is zero, a stock head random with standard deviation 0.02.
    The values come from SHAKE-256 of the public seed and the tensor's name, not from a library's
    generator, so the same plan gives the same bytes everywhere.
    """
    return flatten(initial_tensors(plan), plan.lora.tensors)


def initial_tensors(plan: TrainingPlan) -> dict[str, Vector]:
    """The tensors of `initial_vector` by name; those that are zero take no memory. Read-only."""
    stock = isinstance(plan.task, Classification) and plan.task.head == "stock"
    values: dict[str, Vector] = {}
    for tensor in plan.lora.tensors:
        if tensor.role == "lora_A":
            value = _orthonormal(_normal(plan.lora.seed, tensor))
        elif tensor.role == "head" and stock and len(tensor.shape) > 1:
            value = (0.02 * _normal(plan.lora.seed, tensor)).astype(np.float32)
        else:
            value = np.broadcast_to(np.float32(0), tensor.shape)
        value.flags.writeable = False
        values[tensor.name] = value
    return values


def _normal(seed: int, tensor: Tensor) -> npt.NDArray[np.float64]:
    """Values of mean 0 and variance 1 in the tensor's shape, as sums of twelve uniform values.

    Sums of integers are exact; the last bit of a logarithm differs between builds of one library.
    """
    label = f"umbel/1 initial adapter {seed} {tensor.name}".encode()
    stream = hashlib.shake_256(label).digest(48 * tensor.size)
    words = np.frombuffer(stream, dtype="<u4").reshape(tensor.size, 12)
    total = words.sum(axis=1, dtype=np.int64) - 6 * (2**32 - 1)
    values: npt.NDArray[np.float64] = total * 2.0**-32
    return values.reshape(tensor.shape)


def _orthonormal(matrix: npt.NDArray[np.float64]) -> Vector:
    """Orthonormal rows by Gram and Schmidt's process, done twice for accuracy.

    LAPACK's QR would give other signs and last bits in other builds, but the initial adapter must
    have one digest everywhere. Every operation here is exactly rounded.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    rows: list[npt.NDArray[np.float64]] = []
    for row in wide:
        for _ in range(2):
            for other in rows:
                row = row - _dot(row, other) * other
        rows.append(row / math.sqrt(_dot(row, row)))
    result = np.stack(rows)
    return np.ascontiguousarray(
        result if matrix.shape[0] <= matrix.shape[1] else result.T, dtype=np.float32
    )


def _dot(left: npt.NDArray[np.float64], right: npt.NDArray[np.float64]) -> float:
    return math.fsum((left * right).tolist())
