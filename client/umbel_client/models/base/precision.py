"""The floating-point precision of the frozen base model.

The adapter, its per-record gradients, norms, clipping and noise are float32 in either case, so the
guarantee does not depend on the choice. Gradients differ by about half a per cent.
"""

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from torch import nn
from transformers import PreTrainedModel

from umbel_client.models.base.layers import output_layer

Precision: TypeAlias = Literal["float32", "bfloat16"]


def fastest_precision(device: str = "cpu") -> Precision:
    """`bfloat16` where the hardware multiplies it; elsewhere it would be emulated, and slow."""
    if device != "cpu":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    capabilities: Callable[[], dict[str, object]] = getattr(torch.cpu, "get_capabilities", dict)
    native = capabilities()
    return "bfloat16" if native.get("avx512_bf16") or native.get("amx_bf16") else "float32"


def chosen_precision(choice: Literal["float32", "bfloat16", "fastest"]) -> Precision:
    """The precision that a configuration's `model.precision` means on this machine."""
    return fastest_precision() if choice == "fastest" else choice


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
