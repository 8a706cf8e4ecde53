"""A base model from a local folder: its empty skeleton, or with its weights.

Only safetensors are read, never pickles. Code in the folder is never run.
"""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from umbel_common.errors import ModelError
from umbel_common.plans.plan import CausalLm, Classification, Task

_REPORTS: Any = transformers_logging
"""Transformers leaves these functions untyped."""

_LOADING = threading.Lock()
"""Transformers changes global state while it builds a model, so only one is built at a time."""


def skeleton(folder: Path, task: Task) -> PreTrainedModel:
    """The model's modules without weights: enough to see names and shapes.

    Raises:
        ModelError: the configuration is missing or of an unknown architecture.
    """
    with _building(folder), torch.device("meta"):
        base = _factory(task).from_config(_config(folder, task), trust_remote_code=False)
    return _without_pooler(base, task)


def load_base(folder: Path, task: Task) -> PreTrainedModel:
    """The model with its weights: float32, frozen, in evaluation mode, on the CPU.

    Raises:
        ModelError: the weights do not load, or lack a tensor outside the head: it would be random,
            and different at each site.
    """
    with _building(folder):
        base: PreTrainedModel
        base, report = _factory(task).from_pretrained(
            folder,
            config=_config(folder, task),
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    _check_complete(folder, task, report)
    base = _without_pooler(base, task)
    _check_separable(folder, base)
    base.requires_grad_(False)
    base.train(False)
    return base


def _factory(task: Task) -> Any:
    if isinstance(task, CausalLm):
        return AutoModelForCausalLM
    return AutoModelForSequenceClassification if task.head == "stock" else AutoModel


def _config(folder: Path, task: Task) -> PretrainedConfig:
    config: PretrainedConfig
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if isinstance(task, CausalLm):
        # Training reads each record once, whole, so that a cache would never be read.
        config.use_cache = False
    elif task.head == "stock":
        config.num_labels = len(task.labels)
    return config


@contextmanager
def _building(folder: Path) -> Iterator[None]:
    """Builds one model at a time, quietly, and turns errors into `ModelError`."""
    with quietly():
        try:
            yield
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            raise ModelError("a base model cannot be loaded", file=folder, found=error) from error


@contextmanager
def quietly() -> Iterator[None]:
    """Switches off Transformers' progress bars and reports.

    This is global to the process, so there is one caller at a time.
    """
    with _LOADING:
        level = _REPORTS.get_verbosity()
        bars = _REPORTS.is_progress_bar_enabled()
        _REPORTS.set_verbosity_error()
        _REPORTS.disable_progress_bar()
        try:
            yield
        finally:
            _REPORTS.set_verbosity(level)
            if bars:
                _REPORTS.enable_progress_bar()


@contextmanager
def peft_quietly() -> Iterator[None]:
    """Hides the warning that PEFT uses the old name of a Transformers property."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
        yield


def _without_pooler(base: PreTrainedModel, task: Task) -> PreTrainedModel:
    """Removes the pooler where mean pooling does not use it; the weights may then lack it."""
    mean_pool = isinstance(task, Classification) and task.head == "mean-pool"
    if mean_pool and getattr(base, "pooler", None) is not None:
        base.pooler = None  # type: ignore[assignment]  # as add_pooling_layer=False leaves it
    return base


def _check_complete(folder: Path, task: Task, report: dict[str, Any]) -> None:
    stock = isinstance(task, Classification) and task.head == "stock"
    unused = "classifier." if stock else "pooler."
    differing = [name for name, *_shapes in report["mismatched_keys"]]
    absent = sorted(
        name for name in (*report["missing_keys"], *differing) if not name.startswith(unused)
    )
    if absent:
        raise ModelError(
            "the weights of a base model are incomplete: these would be random at each site",
            file=folder,
            found=f"{len(absent)} absent or of another shape: {', '.join(absent[:5])}",
            remedy="use a complete checkpoint, or the mean-pool head where a pooler is absent",
        )


def _check_separable(folder: Path, base: PreTrainedModel) -> None:
    """Refuses batch norm: frozen or not, it mixes records, which then share a gradient."""
    for name, module in base.named_modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            raise ModelError(
                "a base model mixes the records of a batch",
                file=folder,
                field=name,
                found=type(module).__name__,
                accepted="layer or group norm",
            )
