"""What an architecture allows: how many tokens it knows and reads, and who is to blame if it fails.

Architectures are code of Transformers and PEFT, which fail in their own ways where they are used as
they were not meant to be. Such a failure is turned into an error of ours that names the
architecture.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from umbel_common.errors import ModelError, UmbelError
from umbel_common.plans.plan import Task


@contextmanager
def naming_architecture(base: PreTrainedModel) -> Iterator[None]:
    """Turns whatever an architecture's code raises into a `ModelError` that names it."""
    try:
        yield
    except UmbelError:
        raise
    except Exception as error:
        raise ModelError(
            "a base model's architecture cannot be used in this way",
            field=type(base).__name__,
            found=f"{type(error).__name__}: {error}",
            remedy="use another base model, another task.head, or other lora.target_modules",
        ) from error


def vocabulary_of(base: PreTrainedModel) -> int:
    """Number of tokens that a model has a row for, in its embedding and in its output layer."""
    rows = [
        len(weight)
        for layer in (_layer(base.get_input_embeddings), _layer(base.get_output_embeddings))
        if isinstance(weight := getattr(layer, "weight", None), torch.Tensor)
    ]
    return min(rows, default=int(base.config.get_text_config().vocab_size))


def _layer(get: Callable[[], object]) -> object:
    try:
        return get()
    except (NotImplementedError, AttributeError):
        return None


def width_of(base: PreTrainedModel) -> int:
    """Number of values that a model computes for each token."""
    return int(base.config.get_text_config().hidden_size)


def padding_of(base: PreTrainedModel) -> int:
    """The token that a model takes for padding; 0 if its configuration names none that it knows."""
    pad = getattr(base.config.get_text_config(), "pad_token_id", None)
    return pad if isinstance(pad, int) and 0 <= pad < vocabulary_of(base) else 0


def positions_of(base: PreTrainedModel) -> int | None:
    """Number of tokens that a model can read at once; None: any.

    RoBERTa and its relatives count positions from the one behind that of padding, so that the first
    rows of the table are never read.
    """
    positions = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    most = positions if isinstance(positions, int) and positions > 0 else None
    for name, module in base.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith("position_embeddings"):
            unread = 0 if module.padding_idx is None else module.padding_idx + 1
            usable = module.num_embeddings - unread
            most = usable if most is None else min(most, usable)
    return most


def require_context(folder: Path, base: PreTrainedModel, task: Task) -> None:
    """Refuses a task with longer texts than the model can read.

    Raises:
        ModelError: says how many tokens the model can read.
    """
    positions = positions_of(base)
    if positions is not None and task.max_tokens > positions:
        raise ModelError(
            "a plan asks for longer texts than the base model can read",
            file=folder,
            field="task.max_tokens",
            found=task.max_tokens,
            accepted=f"at most {positions}",
        )
