"""How many records to compute at once: from the memory of one record, and the free memory.

It is measured on made-up records of the plan's greatest length. The answer depends on plan and
machine alone, so that not even the time of a step tells how long this site's texts are.
"""

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from umbel_client.data.tokens import Tokens
from umbel_client.dpsgd.per_record import per_record_gradients
from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.models.base.architecture import padding_of, width_of
from umbel_client.models.inputs import Batch, HiddenInputs, Inputs, PooledInputs, TokenInputs
from umbel_client.tasks.physical_batches import ran_out_of_memory
from umbel_client.tasks.shapes import BatchLimit
from umbel_client.tasks.task import made_up_labels, task_of
from umbel_common.errors import ModelError
from umbel_common.plans.plan import CausalLm, DifferentialPrivacy

SHARE = 0.5
"""Share of the free memory that a physical batch may take, as counted here. The rest is for other
processes and for what is not counted: values that live for one layer only, and the allocator's
waste. On MiniLM the resident set rose by 0.9 to 1.4 times what was counted."""
TOKENS_AT_ONCE = 2048
"""Tokens of the largest useful physical batch on a CPU, for each thread. On MiniLM a record's time
is within 3 % of its minimum from 1,500 to 4,500 tokens, and 8 to 17 % above it from 8,000 on, where
the values no longer fit into the cache."""
UNKNOWN = 32
"""Records computed at once where the system does not say how much memory is free."""


def choose_batch_limit(
    chosen: int | Literal["auto"],
    model: AdaptedModel,
    records_per_unit: int,
) -> BatchLimit:
    """The limit of a job's physical batches.

    Args:
        chosen: records computed at once, as client.toml says; `auto`: as many as
            `find_physical_batch_size` finds.
        records_per_unit: largest number of records of a unit, which are computed at once.

    Raises:
        ModelError: two records do not fit into memory.
    """
    if chosen != "auto":
        return BatchLimit(max(chosen, records_per_unit))
    return BatchLimit(find_physical_batch_size(model, records_per_unit=records_per_unit))


def find_physical_batch_size(
    model: AdaptedModel,
    *,
    records_per_unit: int = 1,
    free: int | None = None,
) -> int:
    """The number of records that fit into memory at once, and are worth computing at once.

    Where a model or its copies are on several devices, the one on which the fewest records fit
    decides.

    Gradients of records may take half of that memory at most. Where a record's gradient is larger
    than its activations, the gradients would otherwise decide how much memory training takes.

    Args:
        records_per_unit: largest number of records of a unit; they are always computed at once.
        free: bytes of free memory of each device; None: what the system says.

    Raises:
        ModelError: two records do not fit into memory.
    """
    tokens = 1 if model.frozen_output == "pooled" else model.plan.task.max_tokens
    fitting = _largest_useful(model, tokens, records_per_unit)
    places = [(one, device) for one in model.copies for device in one.devices]
    for copy, device in places:
        room = free_memory(device) if free is None else free
        if room is None:
            fitting = min(fitting, UNKNOWN)
            continue
        fixed, activations, gradients = record_bytes(copy, device)
        budget = max(int(room * SHARE) - fixed, 0)
        here = budget // max(activations + gradients, 1), budget // 2 // max(gradients, 1)
        fitting = min(fitting, *here)
    return max(fitting, records_per_unit, 1)


def _largest_useful(model: AdaptedModel, tokens: int, records_per_unit: int) -> int:
    """A batch is hardly ever larger than its mean plus four standard deviations.

    Each copy of the model computes its share of it.
    """
    plan = model.plan
    mean = plan.training.expected_batch_size
    whole = math.ceil((mean + 4 * math.sqrt(mean)) / len(model.copies)) * records_per_unit
    if model.device.type != "cpu":
        return whole
    return min(whole, max(1, TOKENS_AT_ONCE * torch.get_num_threads() // tokens))


def record_bytes(model: AdaptedModel, device: torch.device | None = None) -> tuple[int, int, int]:
    """The memory of a physical batch on one device, in the kind of round that needs most.

    Args:
        device: one of the model's; None: its first.

    Returns:
        Bytes that do not depend on the number of records; bytes of each record's activations, kept
        for the backward pass; and bytes of its gradient, zero without privacy.

    Raises:
        ModelError: two records do not fit into memory.
    """
    plan = model.plan
    device = model.device if device is None else device
    private = isinstance(plan.privacy, DifferentialPrivacy)
    rounds = []
    try:
        for number in plan.kinds_of_rounds:
            trained = model.select(number).values()
            one, two = (saved_bytes(model, _longest(model, n), device) for n in (1, 2))
            elements = sum(one.numel() for one in trained if one.device == device)
            rounds.append((max(2 * one - two, 0), two - one, 4 * elements * private))
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error):
            raise
        raise ModelError(
            "two records do not fit into memory",
            field="physical_batch_size",
            found=f"{plan.task.max_tokens} tokens in each",
            remedy="give the trainer more memory,"
            " or agree on a plan with shorter texts or a smaller model",
        ) from None
    return max(rounds, key=lambda parts: parts[1] + parts[2])


def saved_bytes(model: AdaptedModel, batch: Batch, device: torch.device | None = None) -> int:
    """Bytes that the forward pass over a batch keeps on one device for its backward pass.

    Each storage counts once; those that the model holds anyway do not count.

    Args:
        device: one of the model's; None: its first.
    """
    device = model.device if device is None else device
    constant = {value.untyped_storage().data_ptr() for value in model.state_dict().values()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.device == device and storage.data_ptr() not in constant:
            kept[storage.data_ptr()] = storage.nbytes()
        # Torch frees no graph that holds its own outputs.
        return tensor.detach()

    private = isinstance(model.plan.privacy, DifferentialPrivacy)
    with (
        per_record_gradients(model) if private else nullcontext(),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        # They live until all are counted, so that no address is used twice.
        losses = task_of(model.plan.task).losses(model, batch)
    total = sum(kept.values())
    del losses
    return total


def _longest(model: AdaptedModel, records: int) -> Batch:
    """A batch of made-up records, as long as the plan allows."""
    tokens, width = model.plan.task.max_tokens, width_of(model.base)
    mask = torch.ones(records, tokens, dtype=torch.int64)
    inputs: Inputs
    if model.frozen_output == "nothing":
        pad = padding_of(model.base)
        inputs = TokenInputs(torch.full_like(mask, 1 if pad == 0 else 0), mask)
    elif model.frozen_output == "pooled":
        inputs = PooledInputs(torch.ones(records, width))
    else:
        inputs = HiddenInputs(torch.ones(records, tokens, width), mask)
    return Batch(inputs, _labels(model, records))


def _labels(model: AdaptedModel, records: int) -> torch.Tensor:
    task, length = model.plan.task, model.plan.task.max_tokens
    ids = np.zeros(records * length, dtype=np.int32)
    tokens = Tokens(ids, np.arange(records + 1, dtype=np.int64) * length, 0)
    labels = torch.from_numpy(made_up_labels(task, tokens))
    return labels.view(records, length) if isinstance(task, CausalLm) else labels


def free_memory(device: torch.device, root: Path = Path("/")) -> int | None:
    """Bytes that this process may still take on a device; None if the system does not say.

    On the host this is what Linux calls available, or what the process's control groups leave if
    that is less.

    Args:
        root: the folder in which `proc` and `sys` are read.
    """
    if device.type not in ("cpu", "mps"):  # mps shares the host's memory
        module: Any = torch.get_device_module(device)
        # What a former job left in the allocator's hands is free too.
        module.empty_cache()
        free: int = module.mem_get_info(device)[0]
        return free
    limits = [_available(root), *_left_by_groups(root)]
    known = [limit for limit in limits if limit is not None]
    return max(0, min(known)) if known else None


def _available(root: Path) -> int | None:
    kibibytes = _fields(root / "proc/meminfo").get("MemAvailable:")
    return None if kibibytes is None else 1024 * kibibytes


def _left_by_groups(root: Path) -> list[int | None]:
    """What each control group around this process leaves, in version 2 or 1 of their interface."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    left: list[int | None] = []
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            top, limit, usage = "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            top, limit = "sys/fs/cgroup/memory", "memory.limit_in_bytes"
            usage = "memory.usage_in_bytes"
        else:
            continue
        # In a container the name may be outside of what is mounted; the top is then the group.
        inner = Path(name.lstrip("/"))
        left += [_left(root / top / group, limit, usage) for group in (inner, *inner.parents)]
    return left


def _left(group: Path, limit: str, usage: str) -> int | None:
    """What a group leaves; cached files are free, as the kernel drops them before it refuses."""
    most, used = _number(group / limit), _number(group / usage)
    if most is None or used is None:
        return None
    return most - used + _fields(group / "memory.stat").get("inactive_file", 0)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        # `max`: no limit.
        return None


def _fields(path: Path) -> dict[str, int]:
    """Reads a file of lines with a name and a number each."""
    try:
        rows = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}
