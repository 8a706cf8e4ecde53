"""A base model's modules without weights: its configuration, and what no site can fine-tune.

Code in the folder is never run. Transformers gets the bytes of the configuration in a private
folder, and no path into the model's own one.
"""

import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from umbel_common.errors import ModelError, UmbelError
from umbel_common.plans.plan import CausalLm, Classification, Task
from umbel_host.files.model_folder import CONFIG_FILE, parsed_json, private_folder, read_texts
from umbel_host.processes.log import make_printable

_REPORTS: Any = transformers_logging
"""Transformers leaves these functions untyped."""

_LOADING = threading.Lock()
"""Transformers changes global state while it builds a model, so only one is built at a time."""


def skeleton(folder: Path, task: Task, depth: int | None = None) -> PreTrainedModel:
    """The model's modules without weights: enough to see names and shapes.

    Args:
        depth: number of layers; None: all of them.

    Raises:
        ModelError: the configuration is missing or of an unknown architecture, or is an
            encoder-decoder's.
    """
    texts = read_texts(folder)
    with building(folder):
        return without_pooler(empty_model(folder, texts, task, depth), task)


def empty_model(
    folder: Path, texts: Mapping[str, bytes], task: Task, depth: int | None = None
) -> PreTrainedModel:
    """The same from what was read of the folder, with its pooler. Call it within `building`.

    Raises:
        ModelError: see `skeleton`.
    """
    return _empty(_config(folder, texts, task, depth), task)


def model_config(folder: Path, task: Task) -> PretrainedConfig:
    """The model's configuration, for a task.

    Raises:
        ModelError: it is missing or of an unknown architecture.
    """
    texts = read_texts(folder)
    with building(folder):
        return _config(folder, texts, task)


def _empty(config: PretrainedConfig, task: Task) -> PreTrainedModel:
    """The model's modules without weights.

    Raises:
        ModelError: Transformers has no such model for the task.
    """
    try:
        with torch.device("meta"):
            empty: PreTrainedModel = _factory(task).from_config(config, trust_remote_code=False)
    except ValueError as error:
        # The rest of the text lists every class that it knows.
        if not str(error).startswith("Unrecognized configuration class"):
            raise
        causal = isinstance(task, CausalLm)
        raise ModelError(
            "Transformers cannot use a base model of this kind for the task",
            field="model_type",
            found=config.model_type,
            accepted="a decoder (as Llama)" if causal else "a model with a classification head",
            remedy="use another base model" if causal else 'use task.head = "mean-pool"',
        ) from None
    return empty


def _factory(task: Task) -> Any:
    if isinstance(task, CausalLm):
        return AutoModelForCausalLM
    return AutoModelForSequenceClassification if task.head == "stock" else AutoModel


def _config(
    folder: Path, texts: Mapping[str, bytes], task: Task, depth: int | None = None
) -> PretrainedConfig:
    _require_known(folder, texts)
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
    _require_one_stack(folder, config)
    if depth is not None:
        _cut(config, depth)
    return config


def _require_known(folder: Path, texts: Mapping[str, bytes]) -> None:
    """Refuses an architecture whose code is in its folder, before Transformers asks to trust it."""
    settings = parsed_json(folder, CONFIG_FILE, texts.get(CONFIG_FILE, b"{}"))
    if "auto_map" in settings and settings.get("model_type") not in CONFIG_MAPPING:
        raise ModelError(
            "a base model needs code from its own folder, which is never run",
            file=folder / CONFIG_FILE,
            field="model_type",
            found=settings.get("model_type"),
            accepted="an architecture of Transformers",
            remedy="use a base model that needs no trust_remote_code",
        )


def _cut(config: PretrainedConfig, depth: int) -> None:
    """Leaves the first layers of a model, and of each part that has a configuration of its own."""
    for part in [config, *(getattr(config, name, None) for name in config.sub_configs)]:
        layers = getattr(part, "num_hidden_layers", None)
        if not isinstance(part, PretrainedConfig) or not isinstance(layers, int) or layers <= depth:
            continue
        for name, value in list(vars(part).items()):
            # What it says of each layer.
            if isinstance(value, list) and len(value) == layers:
                setattr(part, name, value[:depth])
        # Some families of models count their layers in another way.
        with suppress(NotImplementedError, AttributeError):
            part.num_hidden_layers = depth


def _require_one_stack(folder: Path, config: PretrainedConfig) -> None:
    """Refuses encoder-decoders: they read two texts of a record, and records here have one."""
    if config.is_encoder_decoder:
        raise ModelError(
            "a base model is an encoder-decoder, which Umbel does not fine-tune",
            file=folder / CONFIG_FILE,
            field="model_type",
            found=config.model_type,
            accepted="an encoder (as BERT) for a classification, or a decoder (as Llama)",
            remedy="use another base model",
        )


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
def building(folder: Path) -> Iterator[None]:
    """Builds one model at a time, quietly, and turns errors into `ModelError`."""
    with quietly():
        try:
            yield
        except UmbelError:
            raise
        except Exception as error:  # the libraries promise no classes of errors
            found = f"no {error}" if isinstance(error, KeyError) else error
            raise ModelError("a base model cannot be loaded", file=folder, found=found) from error


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


def without_pooler(base: PreTrainedModel, task: Task) -> PreTrainedModel:
    """Removes the pooler where mean pooling does not use it; the weights may then lack it."""
    mean_pool = isinstance(task, Classification) and task.head == "mean-pool"
    if mean_pool and getattr(base, "pooler", None) is not None:
        base.pooler = None  # type: ignore[assignment]  # as add_pooling_layer=False leaves it
    return base
