"""The gradient of each record, at the cost of the batch's gradient.

This module is part of the core of the privacy guarantee. Never add a layer in which the gradient of
one record depends on another record: a module that has no gradient for each record is refused.

Within the context, every LoRA layer (Hu et al. 2021) computes base and adapter in one fused
function. Trained linear layers without an adapter are fused too. So are A and B, one by one, of
LoRA layers that are not plain: with dropout, a bias, a quantised base, or several adapters. Opacus'
hooks compute everything else that is trained.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from opacus.grad_sample import GradSampleHooks
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from umbel_client.dpsgd.fused import FusedLora, NotSeparate, fused_linear
from umbel_common.errors import ModelError

# The lowest layers see constants, so torch warns that their hooks get no gradient of the input.
warnings.filterwarnings("ignore", message="Full backward hook is firing")


def plain_lora(layer: nn.Module) -> FusedLora | None:
    """The tensors of a plain LoRA layer; None if it is another module, or another kind of LoRA."""
    if type(layer) is not LoraLinear or layer.merged or layer.disable_adapters:
        return None
    base: Any = layer.base_layer
    if len(layer.active_adapters) != 1 or type(base) not in (nn.Linear, Conv1D):
        return None
    (name,) = layer.active_adapters
    if name not in layer.lora_A or type(layer.lora_dropout[name]) is not nn.Identity:
        return None
    A: Any = layer.lora_A[name]
    B: Any = layer.lora_B[name]
    if name in layer.lora_variant or A.bias is not None or B.bias is not None:
        return None
    if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        return None
    weight = base.weight.t() if type(base) is Conv1D else base.weight
    return FusedLora(weight, base.bias, A.weight, B.weight, float(layer.scaling[name]))


@contextmanager
def per_record_gradients(*models: nn.Module) -> Iterator[None]:
    """Within the context, backward passes fill each trained parameter's `grad_sample`.

    Its shape is float32[n, *shape of the parameter] for n records. The loss must be a sum over
    records. The caller takes the gradients after each pass and sets `grad_sample` to None; a second
    pass before that is refused.

    Raises:
        ModelError: a trained module has no gradient for each record.
    """
    with ExitStack() as attached:
        for model in models:
            _attach(model, attached)
        named = [pair for model in models for pair in model.named_parameters()]
        try:
            yield
        except NotSeparate as error:
            error.field = next((name for name, one in named if one is error.parameter), None)
            raise
        finally:
            for _, parameter in named:
                for attribute in ("grad_sample", "grad_sample_pass"):
                    vars(parameter).pop(attribute, None)


def _attach(model: nn.Module, attached: ExitStack) -> None:
    """Lets the model's trained modules keep the gradients of records apart, until the stack ends.

    Raises:
        ModelError: see `per_record_gradients`.
    """
    taken: set[int] = set()
    for name, module in model.named_modules():
        _check_lora(name, module)
        lora = plain_lora(module)
        if lora is not None and (lora.A.requires_grad or lora.B.requires_grad):
            taken |= {id(lora.A), id(lora.B)}
            attached.enter_context(_with_forward(module, lora.forward))
    for name, module in model.named_modules():
        trained = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if not trained or taken.issuperset(map(id, trained)):
            continue
        if type(module) is nn.Linear:
            attached.enter_context(_with_forward(module, partial(fused_linear, layer=module)))
        else:
            attached.enter_context(_hooked(name, module))


def _check_lora(name: str, module: nn.Module) -> None:
    """Refuses DoRA and its like: they send the weights, not the records, through A and B."""
    if isinstance(module, LoraLayer) and module.lora_variant:
        raise ModelError(
            "a variant of LoRA has no gradient for each record",
            field=name,
            found=type(next(iter(module.lora_variant.values()))).__name__,
            accepted="LoRA as in Hu et al. 2021",
        )


@contextmanager
def _with_forward(
    module: nn.Module, forward: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]


@contextmanager
def _hooked(name: str, module: nn.Module) -> Iterator[None]:
    """Opacus computes this module's gradients."""
    if type(module) not in GradSampleHooks.GRAD_SAMPLERS or any(True for _ in module.buffers()):
        raise ModelError(
            "a trained module has no gradient for each record",
            field=name,
            found=type(module).__name__,
            accepted="without buffers, one of "
            + ", ".join(sorted(kind.__name__ for kind in GradSampleHooks.GRAD_SAMPLERS)),
        )
    warnings.warn(
        f"{name} ({type(module).__name__}) is trained through Opacus' slower hooks", stacklevel=2
    )
    hooks = GradSampleHooks(module, loss_reduction="sum", strict=True)
    # Opacus' hooks do nothing in evaluation mode; the layers that it knows behave alike in both.
    module.training = True
    try:
        yield
    finally:
        module.training = False
        hooks.cleanup()
