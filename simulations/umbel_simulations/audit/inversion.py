"""What one site's delta reveals about its texts: DAGER's span check against a LoRA matrix.

Petrov et al. 2024, "DAGER: Exact Gradient Inversion for Large Language Models", section 4.1.

The gradient of B is a sum of outer products with A x, one for each input vector x of the adapted
layer. While a batch has fewer inputs than the rank, its rows span only those A x. In the first
layer x is a known function of token and position, so every token of the vocabulary can be tried:
the tokens of the batch lie in the span. A is public here (method `ffa`), and the attack sees one
site's delta of one step in the clear. Nobody sees it in a federation: there it is masked.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from umbel_client.data.records import Records
from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.models.adapters.lora import plan_lora
from umbel_client.models.base.layers import body_of
from umbel_client.privacy.calibration import noise_for
from umbel_client.tasks.prepared import PreparedData, prepare
from umbel_client.tasks.shapes import BatchLimit
from umbel_client.training.round import LocalTrainer
from umbel_common.adapters.vector import Vector, initial_vector, unflatten
from umbel_common.canonical import Entropy, Value
from umbel_common.plans.plan import LocalPrivacy, NoPrivacy, Sgd, TrainingPlan

_TOKENS_AT_ONCE = 512


class InversionResult(Value, frozen=True):
    """How many of a batch's tokens the attack recovers."""

    epsilon: float | None
    """Cost of the one step; None without differential privacy."""
    records: int
    tokens: int
    """Number of distinct tokens in the batch. The attack knows it, and names as many tokens."""
    vocabulary: int
    recovered: int
    """Number of named tokens that are in the batch. Divided by `tokens`, it is both recall and
    precision."""

    @property
    def chance(self) -> float:
        """Expected value of `recovered` / `tokens` if tokens are named at random."""
        return self.tokens / self.vocabulary


def exposed(plan: TrainingPlan, model: Path, rank: int) -> TrainingPlan:
    """The plan in the form that is easiest to invert: one step of plain gradient descent, and an
    adapter of large rank in the first layer only."""
    lora = plan_lora(
        model,
        plan.task,
        rank=rank,
        alpha=float(rank),
        target_modules=("query", "value"),
        layers=(0,),
        method="ffa",
        seed=plan.lora.seed,
    )
    training = msgspec.structs.replace(
        plan.training,
        rounds=1,
        local_steps=1,
        optimizer=Sgd(adapter_learning_rate=1.0, head_learning_rate=1.0),
    )
    return msgspec.structs.replace(plan, lora=lora, training=training)


def invert(
    plan: TrainingPlan, model: Path, records: Records, entropy: Entropy, *, private: bool
) -> InversionResult:
    """Trains one step on all `records` as a site does, and names the tokens of the batch.

    Args:
        plan: a plan made by `exposed`.
        private: whether the step has the plan's privacy, with noise calibrated to this one step.
    """
    assert isinstance(plan.privacy, LocalPrivacy)
    training = msgspec.structs.replace(plan.training, expected_batch_size=len(records))
    privacy = plan.privacy if private else NoPrivacy()
    plan = msgspec.structs.replace(plan, training=training, privacy=privacy)
    adapted = AdaptedModel.load(model, plan)
    limit = BatchLimit(len(records))
    data = prepare(adapted, model, records, limit, cache=None)
    noise = noise_for(plan, len(records))
    trainer = LocalTrainer(adapted, data, noise, entropy, limit)
    result = trainer.round(1, _with_head(plan))
    true = np.unique(data.tokens.ids)
    distances = distances_from_span(adapted, plan, result.delta, _inputs(data), _longest(data))
    named = np.argsort(distances, kind="stable")[: len(true)]
    return InversionResult(
        epsilon=privacy.epsilon if isinstance(privacy, LocalPrivacy) else None,
        records=len(records),
        tokens=len(true),
        vocabulary=len(distances),
        recovered=len(np.intersect1d(named, true)),
    )


def distances_from_span(
    model: AdaptedModel, plan: TrainingPlan, delta: Vector, inputs: int, positions: int
) -> npt.NDArray[np.float64]:
    """How far each token of the vocabulary lies from the span of the gradients of B.

    Args:
        delta: float32[size of the tensors of round 1].
        inputs: the dimension of the span: the number of distinct (token, position) in the batch.
        positions: length of the longest record.

    Returns:
        float64[vocabulary]: the distance at the nearest position; 0 inside the span.
    """
    changes = unflatten(delta, plan.trained_tensors(1))
    checks = [
        _Check(
            A=model.adapter[name.replace("lora_B", "lora_A")].detach(),
            span=torch.linalg.svd(torch.from_numpy(change.astype(np.float64)))[2][:inputs],
        )
        for name, change in changes.items()
        if ".lora_B." in name
    ]
    nearest = []
    for embedded in _embedded(model, positions):
        total = sum((check(embedded) for check in checks), torch.zeros(()))
        nearest.append(total.amin(dim=1))
    distances: npt.NDArray[np.float64] = torch.cat(nearest).numpy()
    return distances


@dataclass(frozen=True)
class _Check:
    """The span that the delta of one adapted layer reveals."""

    A: torch.Tensor
    """float32[rank, in]."""
    span: torch.Tensor
    """float64[inputs, rank], orthonormal rows."""

    def __call__(self, embedded: torch.Tensor) -> torch.Tensor:
        """float32[n, t, in] -> float64[n, t]: the part of A x outside the span, squared."""
        seen = (embedded @ self.A.T).double()
        seen = seen / seen.norm(dim=-1, keepdim=True)
        outside: torch.Tensor = seen - seen @ self.span.T @ self.span
        return outside.square().sum(dim=-1)


@torch.no_grad()
def _embedded(model: AdaptedModel, positions: int) -> Iterator[torch.Tensor]:
    """The first layer's input for each token at each position, float32[n, positions, in]."""
    embeddings: Any = body_of(model.base).embeddings
    for tokens in torch.split(torch.arange(model.vocabulary), _TOKENS_AT_ONCE):
        yield embeddings(input_ids=tokens[:, None].expand(-1, positions))


def _with_head(plan: TrainingPlan) -> Vector:
    """The initial adapter with a random head: with a head of zeros, B's gradient would be zero."""
    vector = initial_vector(plan)
    generator = np.random.default_rng(plan.lora.seed)
    for tensor, values in zip(
        plan.lora.tensors, unflatten(vector, plan.lora.tensors).values(), strict=True
    ):
        if tensor.role == "head":
            values[...] = generator.normal(0, 0.1, tensor.shape)
    return vector


def _inputs(data: PreparedData) -> int:
    starts = np.repeat(data.tokens.starts[:-1], data.tokens.lengths)
    positions = np.arange(len(data.tokens.ids)) - starts
    return len(np.unique(np.stack([data.tokens.ids, positions]), axis=1).T)


def _longest(data: PreparedData) -> int:
    return int(data.tokens.lengths.max())
