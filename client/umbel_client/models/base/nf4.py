"""A frozen base model in four bits: NF4 with double quantisation (QLoRA, Dettmers et al. 2023).

Each site decides for itself. The adapter, its per-record gradients, clipping and noise are float32
as always, so the guarantee does not depend on it. Gradients are those of a slightly different base
model.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from umbel_client.models.base.layers import output_layer
from umbel_common.errors import ModelError
from umbel_host.installation import install

KIND = "Linear4bit"
"""Name of the class that replaces linear layers; comparing it does not need the package."""


def quantise(base: PreTrainedModel, compute: torch.dtype) -> None:
    """Replaces all linear layers but the output layer and a task's head by layers of four bits.

    These two would lose too much precision. Weights that were quantised while they were read are
    taken as they are.

    Args:
        base: the base model, on the device where it is to compute.
        compute: the precision that weights are turned back into for each product.

    Raises:
        ModelError: bitsandbytes is not installed.
    """
    modules = _four_bit()
    for parent, name, layer in layers_to_quantise(base):
        replacement = modules.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            compute_dtype=compute,
            quant_type="nf4",
            device="meta",
        )
        weight: Any = layer.weight
        if not isinstance(weight, modules.Params4bit):
            weight = four_bits(weight.detach().to("cpu"), weight.device)
        weight.module = replacement
        replacement.weight = weight
        replacement.quant_state = weight.quant_state
        replacement.bias = layer.bias
        # After a pass without gradients its CPU kernel would never give gradients again.
        replacement.support_avx512bf16_for_cpu = False
        setattr(parent, name, replacement)
    # PEFT chooses its kind of layer by this flag.
    base.is_loaded_in_4bit = True  # type: ignore[assignment]
    base.requires_grad_(False)


def layers_to_quantise(base: PreTrainedModel) -> list[tuple[nn.Module, str, nn.Linear]]:
    """The layers that `quantise` replaces: the parent, the name in it, and the layer."""
    kept = (output_layer(base), getattr(base, "classifier", None), getattr(base, "score", None))
    heads = {id(part) for module in kept if module is not None for part in module.modules()}
    return [
        (parent, name, layer)
        for parent in base.modules()
        for name, layer in parent.named_children()
        if type(layer) is nn.Linear and id(layer) not in heads
    ]


def four_bits(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A weight in four bits on a device, from its float32 values on the CPU.

    Raises:
        ModelError: bitsandbytes is not installed.
    """
    parameter: torch.Tensor = (
        _four_bit().Params4bit(values, requires_grad=False, quant_type="nf4").to(device)
    )
    return parameter


def _four_bit() -> Any:
    """The package's layers; it publishes no type information."""
    try:
        from bitsandbytes import nn as four_bit
    except ImportError as error:
        raise ModelError(
            "four-bit base models need a package that is not installed",
            field="model.quantisation",
            found=error,
            accepted="none",
            remedy=install("client", "quantised"),
        ) from None
    return four_bit
