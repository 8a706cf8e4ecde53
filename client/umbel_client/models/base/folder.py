"""A base model from a local folder: its empty skeleton, or with its weights.

What is loaded is what was hashed (`umbel_host.files.model_folder`): Transformers gets no path into
the folder. It gets the bytes of the small files in a private folder, and the weights as tensors.

Only safetensors are read, never pickles. Code in the folder is never run.
"""

import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
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

from umbel_client.models.base.attention import make_every_mask
from umbel_client.models.base.files import file_digest, model_digest, shards_of, weights_of
from umbel_client.models.base.weights import read_weights
from umbel_common.errors import ModelError, UmbelError
from umbel_common.plans.plan import CausalLm, Classification, Task
from umbel_host.files.model_folder import (
    CONFIG_FILE,
    FileDigests,
    private_folder,
    read_texts,
    text_digest,
)
from umbel_host.processes.log import make_printable

_REPORTS: Any = transformers_logging
"""Transformers leaves these functions untyped."""

_LOADING = threading.Lock()
"""Transformers changes global state while it builds a model, so only one is built at a time."""


def skeleton(folder: Path, task: Task) -> PreTrainedModel:
    """The model's modules without weights: enough to see names and shapes.

    Raises:
        ModelError: the configuration is missing or of an unknown architecture.
    """
    config = model_config(folder, task)
    with _building(folder):
        return _without_pooler(_empty(config, task), task)


def model_config(folder: Path, task: Task) -> PretrainedConfig:
    """The model's configuration, for a task.

    Raises:
        ModelError: it is missing or of an unknown architecture.
    """
    texts = read_texts(folder)
    with _building(folder):
        return _config(folder, texts, task)


@dataclass(frozen=True)
class BaseContent:
    """The files of a base model that count, as they were read: each once, and hashed."""

    folder: Path
    texts: Mapping[str, bytes]
    """Configuration and tokenizer."""
    tensors: Mapping[str, torch.Tensor]
    files: FileDigests

    @property
    def digest(self) -> bytes:
        """The model's digest, of exactly what was read."""
        return model_digest(self.files)


def read_base(folder: Path) -> BaseContent:
    """Reads a base model into memory.

    Raises:
        ModelError: see `umbel_client.models.base.files.folder_digest`.
    """
    weights = weights_of(folder)
    texts = read_texts(folder)
    files = {name: text_digest(text) for name, text in texts.items()}
    tensors: dict[str, torch.Tensor] = {}
    shards = shards_of(folder, texts, weights)
    for name in shards:
        found, files[name] = read_weights(folder / name)
        tensors |= found
    for name in weights:
        if name not in shards:
            files[name] = file_digest(folder / name)
    return BaseContent(folder, texts, tensors, files)


def load_base(folder: Path, task: Task) -> PreTrainedModel:
    """Reads a base model and builds it: see `read_base` and `build_base`."""
    return build_base(read_base(folder), task)


def build_base(content: BaseContent, task: Task) -> PreTrainedModel:
    """The model with its weights: float32, frozen, in evaluation mode, on the CPU.

    Raises:
        ModelError: the weights do not load, or lack a tensor outside the head: it would be random,
            and different at each site.
    """
    folder = content.folder
    make_every_mask()
    with _building(folder):
        empty = _empty(_config(folder, content.texts, task), task)
        model: Any = type(empty)
        base: PreTrainedModel
        # Without a path, it reads no file: also no adapter, generation settings or other weights.
        base, report = model.from_pretrained(
            None,
            config=empty.config,
            state_dict=dict(content.tensors),
            dtype=torch.float32,
            local_files_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    base.config.name_or_path = str(folder)
    _check_complete(folder, task, report)
    base = _without_pooler(base, task)
    _check_separable(folder, base)
    base.requires_grad_(False)
    base.train(False)
    return base


def _empty(config: PretrainedConfig, task: Task) -> PreTrainedModel:
    """The model's modules without weights."""
    with torch.device("meta"):
        empty: PreTrainedModel = _factory(task).from_config(config, trust_remote_code=False)
    return empty


def _factory(task: Task) -> Any:
    if isinstance(task, CausalLm):
        return AutoModelForCausalLM
    return AutoModelForSequenceClassification if task.head == "stock" else AutoModel


def _config(folder: Path, texts: Mapping[str, bytes], task: Task) -> PretrainedConfig:
    config: PretrainedConfig
    config_file = {name: text for name, text in texts.items() if name == CONFIG_FILE}
    with private_folder(folder, config_file) as place:
        config = AutoConfig.from_pretrained(place, local_files_only=True, trust_remote_code=False)
    if isinstance(task, CausalLm):
        # Training reads each record once, whole, so that a cache would never be read.
        config.use_cache = False
    elif task.head == "stock":
        config.num_labels = len(task.labels)
    _require_unquantised(folder, config)
    return config


def _require_unquantised(folder: Path, config: PretrainedConfig) -> None:
    """Refuses a configuration that asks Transformers for quantised layers.

    Some compute a record by the values of all records (LLM.int8), and what is computed depends on
    the packages of the machine.
    """
    # Where Transformers looks for it.
    for part in (config, config.get_text_config(decoder=True)):
        if getattr(part, "quantization_config", None) is not None:
            raise ModelError(
                "the configuration of a base model asks for quantised layers",
                file=folder / CONFIG_FILE,
                field="quantization_config",
                accepted="none",
                remedy="use the model's weights in float32, float16 or bfloat16; a site may set"
                ' model.quantisation = "nf4"',
            )


@contextmanager
def _building(folder: Path) -> Iterator[None]:
    """Builds one model at a time, quietly, and turns errors into `ModelError`."""
    with quietly():
        try:
            yield
        except UmbelError:
            raise
        except Exception as error:  # the libraries promise no classes of errors
            raise ModelError("a base model cannot be loaded", file=folder, found=error) from error


@contextmanager
def quietly() -> Iterator[None]:
    """Switches off Transformers' progress bars and reports.

    This is global to the process, so there is one caller at a time.
    """
    with _LOADING:
        make_printable("transformers")
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
