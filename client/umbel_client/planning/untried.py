"""A plan from what is written in a model's folder, without the packages that load a model.

An operator's machine needs no PyTorch, and the tensors of an adapter follow from the names and
shapes of the weights that it adapts. Those are in the header of each safetensors file. Nothing is
computed, so such a plan is not tried: whether gradients separate, whether the model can be loaded
at all and whether its tokenizer fits it is found out by `umbel-server plan try`.

Only architectures are known whose modules have the names of their weights. Any other one is refused
rather than guessed.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from safetensors import SafetensorError, safe_open

from umbel_client.planning.draft_file import Draft, model_folder, plan_of
from umbel_common.adapters.peft_folder import PEFT_PREFIX
from umbel_common.errors import ModelError
from umbel_common.plans.plan import (
    CausalLm,
    Classification,
    Lora,
    Tensor,
    TrainingPlan,
)
from umbel_host.files.model_digest import shards_of, weights_of
from umbel_host.files.model_folder import CONFIG_FILE, parsed_json, read_texts
from umbel_host.installation import install


@dataclass(frozen=True)
class _Architecture:
    """How a kind of model names its weights."""

    inner: str
    """Name of the model within one with an output layer; weights may carry it as a prefix."""
    layers: str
    """Name of the list of layers, within the inner model."""
    turned: bool = False
    """Whether weights are stored as [in, out]."""
    reads: tuple[str, ...] = ("max_position_embeddings",)
    """Fields of the configuration that bound the number of tokens."""
    reads_ahead: bool = False
    """Whether it is an encoder, unless its configuration makes it a decoder."""
    unread: bool = False
    """Whether positions are counted from behind that of padding."""


_DECODER = _Architecture("model", "layers")
_BERT = _Architecture("bert", "encoder.layer", reads_ahead=True)
_ROBERTA = _Architecture("roberta", "encoder.layer", reads_ahead=True, unread=True)
_KNOWN = {
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "distilbert": _Architecture("distilbert", "transformer.layer", reads_ahead=True),
    "gpt2": _Architecture("transformer", "h", turned=True, reads=("n_positions",)),
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "smollm3", "olmo2"),
        _DECODER,
    ),
}
_WIDTH = ("hidden_size", "dim", "n_embd")
"""Names that configurations have for the width of a model."""


def untried_plan(draft: Draft, folder: Path) -> TrainingPlan:
    """Makes the plan of a draft from the model's files alone.

    Args:
        folder: where relative paths start.

    Raises:
        DataError: the release gate's holdout cannot be read.
        ModelError, PlanError: the model is not of a known architecture, lacks a target of the
            draft, or cannot read texts as long as the task's; or the parts of the plan do not fit
            together.
    """
    model = _Model(model_folder(draft, folder), draft)
    model.require_context(draft.task.max_tokens)
    asked = draft.lora
    targets = model.all_linear() if asked.target_modules == "all-linear" else asked.target_modules
    lora = Lora(
        rank=asked.rank,
        alpha=asked.alpha,
        target_modules=targets,
        layers=asked.layers,
        method=asked.method,
        seed=draft.seed,
        tensors=model.tensors(targets, asked.layers, asked.rank),
        scaling=asked.scaling,
    )
    return plan_of(draft, folder, model.folder, lora)


class _Model:
    """What a model's folder says of its linear layers."""

    def __init__(self, folder: Path, draft: Draft) -> None:
        self.folder = folder
        weights = weights_of(folder)
        texts = read_texts(folder)
        self.config = parsed_json(folder, CONFIG_FILE, texts[CONFIG_FILE])
        kind = self.config.get("model_type")
        known = _KNOWN.get(kind) if isinstance(kind, str) else None
        stock = isinstance(draft.task, Classification) and draft.task.head == "stock"
        causal = isinstance(draft.task, CausalLm)
        ahead = causal and known is not None and known.reads_ahead
        if known is None or stock or ahead or "quantization_config" in self.config:
            use = ", with a stock head" if stock else ", as a language model" if ahead else ""
            raise ModelError(
                "this plan needs the packages that load a model, which are not installed here",
                file=folder,
                field="model_type",
                found=f"{kind}{use}",
                accepted=", ".join(sorted(_KNOWN)),
                remedy="name a Python that has them in evaluation.python of server.toml"
                f" ({install('client')}), or make the plan on such a machine and copy the file: it"
                " is signed here",
            )
        self.kind = known
        self.prefix = f"{known.inner}." if causal else ""
        self.head = draft.task.labels if isinstance(draft.task, Classification) else None
        shapes: dict[str, tuple[int, ...]] = {}
        for name in shards_of(folder, texts, weights):
            shapes |= _shapes(folder / name)
        # By the names of the inner model, whatever it was saved within.
        self.shapes = {name.removeprefix(f"{known.inner}."): one for name, one in shapes.items()}
        self.linear = self._linear()

    def _linear(self) -> dict[str, tuple[int, int]]:
        """(in, out) of each linear layer, by its name in the inner model."""
        found = {}
        for name, shape in self.shapes.items():
            module = name.removesuffix(".weight")
            if module != name and len(shape) == 2 and self._layer_of(module) is not None:
                found[module] = (shape[0], shape[1]) if self.kind.turned else (shape[1], shape[0])
        if not found:
            raise ModelError(
                "no linear layer is found in the files of a base model",
                file=self.folder,
                field=self.kind.layers,
                found=f"{len(self.shapes)} tensors",
            )
        return found

    def _layer_of(self, module: str) -> int | None:
        match = re.match(rf"{re.escape(self.kind.layers)}\.(\d+)\.", module)
        return int(match.group(1)) if match else None

    @property
    def width(self) -> int:
        """The width of the model, which its head reads."""
        found: Any = next((self.config[name] for name in _WIDTH if name in self.config), None)
        if not isinstance(found, int):
            raise ModelError(
                "a base model's configuration does not say how wide the model is",
                file=self.folder / CONFIG_FILE,
                field=_WIDTH[0],
                found=found,
                accepted="a whole number",
            )
        return found

    def require_context(self, asked: int) -> None:
        """Refuses longer texts than the model can read.

        Raises:
            ModelError: says how many tokens it can read.
        """
        most = [
            value for name in self.kind.reads if isinstance(value := self.config.get(name), int)
        ]
        unread = int(self.config.get("pad_token_id") or 0) + 1 if self.kind.unread else 0
        most += [
            shape[0] - unread
            for name, shape in self.shapes.items()
            if name.endswith("position_embeddings.weight")
        ]
        if most and asked > min(most):
            raise ModelError(
                "a plan asks for longer texts than the base model can read",
                file=self.folder,
                field="task.max_tokens",
                found=asked,
                accepted=f"at most {min(most)}",
            )

    def all_linear(self) -> tuple[str, ...]:
        """Names of all linear layers that may have an adapter."""
        inside = {
            name.rpartition(".")[2] for name in self.linear if self._layer_of(name) is not None
        }
        return tuple(sorted(inside))

    def tensors(
        self, targets: tuple[str, ...], layers: tuple[int, ...] | None, rank: int
    ) -> tuple[Tensor, ...]:
        """The adapter's tensors, sorted by name, as PEFT would name them.

        Raises:
            ModelError: a target is in no linear layer, or not in each layer that is asked for.
        """
        found: dict[str, tuple[tuple[int, ...], str]] = {}
        for target in targets:
            matches = [
                name for name in self.linear if name == target or name.endswith(f".{target}")
            ]
            for layer in [None] if layers is None else layers:
                chosen = [name for name in matches if layer in (None, self._layer_of(name))]
                if not chosen:
                    raise self._no_target(target, layer)
                for name in chosen:
                    inside, out = self.linear[name]
                    saved = f"{PEFT_PREFIX}{self.prefix}{name}"
                    found[f"{saved}.lora_A.weight"] = ((rank, inside), "lora_A")
                    found[f"{saved}.lora_B.weight"] = ((out, rank), "lora_B")
        if self.head is not None:
            found["head.weight"] = ((len(self.head), self.width), "head")
            found["head.bias"] = ((len(self.head),), "head")
        return tuple(
            msgspec.convert({"name": name, "shape": shape, "role": role}, type=Tensor)
            for name, (shape, role) in sorted(found.items())
        )

    def _no_target(self, target: str, layer: int | None) -> ModelError:
        numbers = {number for name in self.linear if (number := self._layer_of(name)) is not None}
        return ModelError(
            "an adapter's target is not a linear layer of the base model",
            file=self.folder,
            field=f"lora.target_modules: {target}"
            + ("" if layer is None else f" in layer {layer}"),
            found="no module of that name",
            accepted=f"linear layers {', '.join(self.all_linear())} in layers {sorted(numbers)}",
        )


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor in a file, from its header.

    Raises:
        ModelError: it is not a safetensors file, or cannot be read.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in list(file.keys())}
    except (SafetensorError, OSError) as error:
        raise ModelError("the weights of a model cannot be read", file=path, found=error) from None
