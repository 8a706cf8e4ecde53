"""A head that starts at the embeddings of its labels' names.

The names are public: they are in the plan. So nothing here is private, and nothing costs privacy. A
name takes exactly the path of a record: the same tokenizer and cut, the same padding, the base
model with the adapter of the seed, which changes nothing, and the mean-pool head's own input.
"""

from pathlib import Path

import numpy as np

from umbel_client.data.tokens import tokenise
from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.tasks.frozen_cache import token_inputs
from umbel_client.tasks.shapes import padded_lengths
from umbel_common.adapters.start import start_from_rows
from umbel_common.adapters.vector import Vector, initial_vector
from umbel_common.errors import DataError, ModelError, PlanError
from umbel_common.plans.plan import TrainingPlan
from umbel_common.plans.start import LabelNamesStart, SeedStart

_AT_ONCE = 16
_UNIT = 1e-3
"""A vector of a text is at unit length within this; one that is not has no direction."""


def computed_start(model: AdaptedModel, folder: Path, plan: TrainingPlan) -> Vector:
    """The adapter that a plan starts from, as this machine computes it.

    Args:
        folder: the base model's, for its tokenizer.

    Raises:
        ModelError: the tokenizer cannot be used, or a label's name has no embedding.
        PlanError: the plan starts from an earlier release, which nobody can compute.
    """
    match plan.start:
        case SeedStart():
            return initial_vector(plan)
        case LabelNamesStart() as start:
            return start_from_rows(
                plan, label_rows(model, folder, plan, start.names, scale=start.scale)
            )
        case _:
            raise PlanError(
                "an adapter that an earlier job released is not computed again",
                field="start",
                found="released",
                accepted="seed or label-names",
            )


def label_rows(
    model: AdaptedModel, folder: Path, plan: TrainingPlan, names: tuple[str, ...], *, scale: float
) -> Vector:
    """The embedding of each name, at length `scale`: float32[names, hidden size].

    Args:
        model: the plan's model; its adapter becomes the seed's.
        folder: the base model's, for its tokenizer.

    Raises:
        ModelError: the tokenizer cannot be used, or a name has no embedding.
    """
    try:
        tokens = tokenise(names, folder, plan.task.max_tokens, model.files)
    except DataError as error:
        raise ModelError(
            "a label's name cannot be read by the base model's tokenizer",
            file=folder,
            field="start.names",
            found=error.field,
        ) from error
    if tokens.ids.max(initial=0) >= model.vocabulary:
        raise ModelError(
            "a label's name holds a token that the model does not know",
            file=folder,
            field="start.names",
            found=f"token {tokens.ids.max()}",
            accepted=f"tokens 0 to {model.vocabulary - 1}",
        )
    model.set_vector(initial_vector(plan))
    padded = padded_lengths(tokens.lengths, plan.task.max_tokens)
    rows: Vector | None = None
    for length in np.unique(padded):
        alike = np.flatnonzero(padded == length)
        for first in range(0, len(alike), _AT_ONCE):
            part = alike[first : first + _AT_ONCE]
            # In one number of rows, whatever the number of labels is.
            inputs = token_inputs(tokens, np.resize(part, _AT_ONCE), int(length))
            found: Vector = model.pooled(inputs)[: len(part)].cpu().numpy()
            if rows is None:
                rows = np.empty((len(names), found.shape[1]), dtype=np.float32)
            rows[part] = found
    assert rows is not None  # a plan has at least two labels
    norms = np.sqrt(np.square(rows, dtype=np.float64).sum(axis=1, keepdims=True))
    without = np.flatnonzero(~(np.abs(norms[:, 0] - 1) < _UNIT))
    if len(without):
        raise ModelError(
            "a label's name has no embedding",
            file=folder,
            field="start.names",
            found=repr(names[without[0]]),
            remedy="give the label a name in words",
        )
    scaled: Vector = (scale * rows / norms).astype(np.float32)
    return scaled
