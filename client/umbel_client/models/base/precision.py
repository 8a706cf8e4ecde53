"""The floating-point precision of the frozen base model.

The adapter, its per-record gradients, norms, clipping and noise are float32 in either case, so the
guarantee does not depend on the choice. Gradients differ by about half a per cent.
"""

import logging
from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from torch import nn
from transformers import PreTrainedModel

from umbel_client.models.base.layers import output_layer

Precision: TypeAlias = Literal["float32", "bfloat16"]

_logger = logging.getLogger("umbel.model")


def fastest_precision(device: torch.device) -> Precision:
    """`bfloat16` where the hardware multiplies it; elsewhere it would be emulated, and slow."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if native else "float32"
    if device.type != "cpu":
        return "float32"
    capabilities: Callable[[], dict[str, object]] = getattr(torch.cpu, "get_capabilities", dict)
    found = capabilities()
    return "bfloat16" if found.get("avx512_bf16") or found.get("amx_bf16") else "float32"


def chosen_precision(
    choice: Literal["float32", "bfloat16", "fastest"], *devices: torch.device
) -> Precision:
    """The precision that a configuration's `model.precision` means on a device.

    An accelerator that does not multiply bfloat16 computes in float32 instead, and the log says so.
    Several devices compute in the same precision: float32, if one of them does.
    """
    each = {_chosen(choice, device) for device in devices}
    return "float32" if "float32" in each else "bfloat16"


def _chosen(choice: Literal["float32", "bfloat16", "fastest"], device: torch.device) -> Precision:
    if choice == "float32":
        return choice
    fastest = fastest_precision(device)
    if choice == "bfloat16" and fastest == "float32" and device.type != "cpu":
        _logger.warning(
            "%s does not multiply bfloat16 natively: the model computes in float32, and its frozen"
            " layers take twice the memory (model.precision in client.toml)",
            device,
        )
        return fastest
    return choice if choice == "bfloat16" else fastest


def lower_precision(base: PreTrainedModel) -> None:
    """Stores the weights of frozen linear layers as bfloat16, for forward passes in `computing`.

    Norms and embeddings stay float32: they cost little, and would lose precision.
    """
    embedding, output = base.get_input_embeddings(), output_layer(base)
    if output is not None and output.weight is embedding.weight:
        # Both share one tensor, which becomes bfloat16 here; the sums above it stay float32.
        embedding.register_forward_hook(lambda _module, _inputs, vectors: vectors.float())
    for module in base.modules():
        if type(module) is nn.Linear and not module.weight.requires_grad:
            module.to(torch.bfloat16)
    if base.device.type == "cpu":
        # The fused attention of torch's CPU build is 8 times slower in bfloat16 on short records.
        base.set_attn_implementation("eager")


def computing(precision: Precision, device: torch.device) -> torch.autocast:
    """The context of a forward pass through the base model."""
    return torch.autocast(
        device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False
    )
