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

KIND = "Linear4bit"
"""Name of the class that replaces linear layers; comparing it does not need the package."""


def quantise(base: PreTrainedModel, compute: torch.dtype) -> None:
    """Replaces the weights of all linear layers but the output layer and a task's head.

    These two would lose too much precision.

    Args:
        base: the base model, on the device where it is to compute.
        compute: the precision that weights are turned back into for each product.

    Raises:
        ModelError: bitsandbytes is not installed.
    """
    try:
        from bitsandbytes import nn as four_bit
    except ImportError as error:
        raise ModelError(
            "four-bit base models need a package that is not installed",
            field="model.quantisation",
            found=error,
            accepted="none",
            remedy='pip install "umbel[client,quantised]"',
        ) from None
    modules: Any = four_bit  # it publishes no type information
    kept = (output_layer(base), getattr(base, "classifier", None), getattr(base, "score", None))
    heads = {id(part) for module in kept if module is not None for part in module.modules()}
    for parent in list(base.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is not nn.Linear or id(layer) in heads:
                continue
            replacement = modules.Linear4bit(
                layer.in_features,
                layer.out_features,
                bias=layer.bias is not None,
                compute_dtype=compute,
                quant_type="nf4",
                device="meta",
            )
            values = layer.weight.detach()
            replacement.weight = modules.Params4bit(
                values.to("cpu"), requires_grad=False, quant_type="nf4", module=replacement
            ).to(values.device)
            replacement.bias = layer.bias
            # After a pass without gradients its CPU kernel would never give gradients again.
            replacement.support_avx512bf16_for_cpu = False
            setattr(parent, name, replacement)
    # PEFT chooses its kind of layer by this flag.
    base.is_loaded_in_4bit = True  # type: ignore[assignment]
    base.requires_grad_(False)
