"""A base model from a local folder: its empty skeleton, or with its weights.

What is loaded is what was hashed (`umbel_host.files.model_folder`): Transformers gets no path into
the folder. It gets the bytes of the small files in a private folder, and the weights as tensors.

Only safetensors are read, never pickles. Code in the folder is never run.
"""

import math
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
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

from umbel_client.models.base.attention import make_every_mask
from umbel_client.models.base.layers import all_layers, without_layers
from umbel_client.models.base.placement import AsComputed, Placement, places_of
from umbel_client.models.base.weights import Place, WeightFile, opened_weights
from umbel_common.errors import ModelError, UmbelError
from umbel_common.plans.plan import CausalLm, Classification, Task
from umbel_host.files.model_digest import file_digest, model_digest, shards_of, weights_of
from umbel_host.files.model_folder import (
    CONFIG_FILE,
    FileDigests,
    parsed_json,
    private_folder,
    read_texts,
    text_digest,
)
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
    return _without_pooler(_skeleton(folder, read_texts(folder), task, depth), task)


def _skeleton(
    folder: Path, texts: Mapping[str, bytes], task: Task, depth: int | None = None
) -> PreTrainedModel:
    with _building(folder):
        return _empty(_config(folder, texts, task, depth), task)


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
    tensors: dict[str, torch.Tensor]
    """By their names in the files."""
    files: FileDigests
    placement: Placement = field(default_factory=AsComputed)
    """The devices of the model."""
    places: Mapping[str, Place] = field(default_factory=dict)
    """Where tensors were put while they were read, by their names in the files."""

    @property
    def digest(self) -> bytes:
        """The model's digest, of exactly what was read."""
        return model_digest(self.files)


def read_base(
    folder: Path, task: Task | None = None, placement: Placement | None = None
) -> BaseContent:
    """Reads a base model, each byte once, and puts its tensors where they compute.

    Args:
        task: what the model is for; it decides on the parameters.
        placement: without it, or without a task, all tensors stay on the CPU, of half precision as
            float32.

    Raises:
        ModelError: see `umbel_host.files.model_digest.folder_digest`.
    """
    weights = weights_of(folder)
    texts = read_texts(folder)
    files = {name: text_digest(text) for name, text in texts.items()}
    tensors: dict[str, torch.Tensor] = {}
    places: Mapping[str, Place] = {}
    with ExitStack() as stack:
        names = shards_of(folder, texts, weights)
        shards = [stack.enter_context(opened_weights(folder / name)) for name in names]
        if task is not None and placement not in (None, AsComputed()):
            places = _places(folder, texts, task, placement, shards)
        for name, shard in zip(names, shards, strict=True):
            found, files[name] = shard.read(places)
            tensors |= found
    for name in weights:
        if name not in names:
            files[name] = file_digest(folder / name)
    return BaseContent(folder, texts, tensors, files, placement or AsComputed(), places)


def _places(
    folder: Path,
    texts: Mapping[str, bytes],
    task: Task,
    placement: Placement,
    shards: Sequence[WeightFile],
) -> Mapping[str, Place]:
    shapes = {name: shape for shard in shards for name, shape in shard.shapes.items()}
    try:
        return places_of(_skeleton(folder, texts, task), task, placement, shapes)
    except ModelError:
        # It is raised again when the model is built, after its digest was compared with a plan's.
        return {}


def empty_base(content: BaseContent, task: Task) -> PreTrainedModel:
    """The same as `skeleton` gives, from what was read."""
    return _without_pooler(_skeleton(content.folder, content.texts, task), task)


def load_base(folder: Path, task: Task) -> PreTrainedModel:
    """Reads a base model and builds it: see `read_base` and `build_base`."""
    return build_base(read_base(folder), task)


def made_up_base(folder: Path, task: Task, depth: int | None = None) -> PreTrainedModel:
    """The model with made-up weights of the shapes that its files have.

    Weights share their memory: together they take about that of the largest one.

    Args:
        depth: number of layers; None: all of them.

    Raises:
        ModelError: see `build_base`.
    """
    texts = read_texts(folder)
    shapes: dict[str, tuple[int, ...]] = {}
    tensors: dict[str, torch.Tensor] = {}
    for file in shards_of(folder, texts, weights_of(folder)):
        with opened_weights(folder / file) as shard:
            for name, shape in shard.shapes.items():
                if shard.are_numbers[name]:
                    shapes[name] = shape
                else:
                    tensors[name] = torch.zeros((), dtype=torch.int64).expand(shape)
    with _building(folder):
        tensors |= _made_up(shapes)
    return build_base(BaseContent(folder, texts, tensors, {}), task, depth)


_LARGEST = 1 << 28
"""Number of elements above which a made-up weight, mostly an embedding, has rows that overlap."""


def _made_up(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Float32 tensors with values as a fresh model has them, by name."""
    random = torch.Generator().manual_seed(0)
    sizes: dict[int, int] = {}
    for shape in shapes.values():
        size = math.prod(shape)
        if len(shape) > 1 and size <= _LARGEST:
            sizes[math.prod(shape[1:])] = max(sizes.get(math.prod(shape[1:]), 0), size)
    # All matrices with as many inputs are parts of one vector; each begins at another place.
    vectors = {
        inputs: torch.randn(size + len(shapes), generator=random) / math.sqrt(inputs or 1)
        for inputs, size in sizes.items()
    }
    made: dict[str, torch.Tensor] = {}
    for number, (name, shape) in enumerate(shapes.items()):
        size, inputs = math.prod(shape), math.prod(shape[1:])
        if len(shape) < 2:
            small = 0.02 * torch.randn(shape, generator=random)
            # The weight of a norm, as a rule.
            made[name] = 1 + small if name.endswith("weight") else small
        elif size <= _LARGEST:
            made[name] = vectors[inputs][number : number + size].view(shape)
        else:
            values = torch.randn(sum(shape), generator=random) / math.sqrt(inputs)
            made[name] = values.as_strided(shape, [1] * len(shape))
    return made


def build_base(content: BaseContent, task: Task, depth: int | None = None) -> PreTrainedModel:
    """The model with its weights: frozen, in evaluation mode, on its devices.

    Parameters without a place are float32.

    Args:
        depth: number of layers that are built; None: all of them.

    Raises:
        ModelError: the weights do not load, or lack a tensor outside the head: it would be random,
            and different at each site.
    """
    folder = content.folder
    make_every_mask()
    places = content.places
    # Equal to no tensor, not even to each other: Transformers ties parameters that are equal.
    stand_ins = {
        name: torch.full((), math.nan).expand(place.shape) for name, place in places.items()
    }
    with _building(folder):
        empty = _empty(_config(folder, content.texts, task, depth), task)
        model: Any = type(empty)
        base: PreTrainedModel
        # Without a path, it reads no file: also no adapter, generation settings or other weights.
        base, report = model.from_pretrained(
            None,
            config=empty.config,
            state_dict={**content.tensors, **stand_ins},
            dtype=torch.float32,
            local_files_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    base.config.name_or_path = str(folder)
    _check_complete(folder, task, report)
    if not _went_to_their_places(base, empty, places, stand_ins):
        del base
        return build_base(_read_again(content), task)
    _take_places(base, content, stand_ins, content.placement.layer_devices(empty, task))
    base = _without_pooler(base, task)
    _check_separable(folder, base)
    base.requires_grad_(False)
    base.train(False)
    return base


def _went_to_their_places(
    base: PreTrainedModel,
    empty: PreTrainedModel,
    places: Mapping[str, Place],
    stand_ins: Mapping[str, torch.Tensor],
) -> bool:
    """Whether Transformers took each tensor that has a place for the parameter it was meant for.

    And no other tensor for that parameter under a second name, as of an output layer that is tied
    to the embedding: Transformers would have compared it with the tensor itself.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in empty.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return all(
        base.get_parameter(name).data_ptr() == stand_ins[tensor].data_ptr()
        for tensor, place in places.items()
        for name in names[id(empty.get_parameter(place.parameter))]
    )


def _read_again(content: BaseContent) -> BaseContent:
    """The same model without places: Transformers makes parameters of several of its tensors.

    Raises:
        ModelError: the folder has changed since.
    """
    content.tensors.clear()
    again = read_base(content.folder)
    if again.digest != content.digest:
        raise ModelError(
            "a base model changed while it was loaded",
            file=content.folder,
            found=again.digest.hex(),
            accepted=content.digest.hex(),
            remedy="leave the model's folder alone while it is in use, and start again",
        )
    return replace(again, placement=content.placement)


def _take_places(
    base: PreTrainedModel,
    content: BaseContent,
    stand_ins: Mapping[str, torch.Tensor],
    layer_devices: tuple[torch.device, ...],
) -> None:
    """Puts the tensors where their stand-ins are, and all others on the devices of the model."""
    names = {stand_in.data_ptr(): name for name, stand_in in stand_ins.items()}
    owners: list[tuple[nn.Module, str, str]] = []
    for module in base.modules():
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = names.get(parameter.data_ptr())
            if name is not None and parameter.data_ptr() != 0:
                owners.append((module, key, name))
                setattr(module, key, None)
    _move(base, content.placement.device, layer_devices)
    made: dict[str, nn.Parameter] = {}
    for module, key, name in owners:
        # One parameter for all layers that share it.
        if name not in made:
            tensor = content.tensors[name]
            made[name] = (
                tensor
                if isinstance(tensor, nn.Parameter)
                else nn.Parameter(tensor, requires_grad=False)
            )
        setattr(module, key, made[name])


def _move(
    base: PreTrainedModel, device: torch.device, layer_devices: tuple[torch.device, ...]
) -> None:
    layers = all_layers(base) if layer_devices else None
    if layers is None:
        base.to(device)  # type: ignore[arg-type]  # wrapped by torch
        return
    with without_layers(base):
        base.to(device)  # type: ignore[arg-type]  # wrapped by torch
    for layer, there in zip(layers, layer_devices, strict=True):
        layer.to(there)


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
def _building(folder: Path) -> Iterator[None]:
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
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ModelError(
                "a base model mixes the records of a batch",
                file=folder,
                field=name,
                found=type(module).__name__,
                accepted="layer or group norm",
            )
