"""The base model with its adapter, from a local folder: the model that a site trains."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from umbel_client.models.adapters.lora import attach, fill, require_tensors
from umbel_client.models.base import int8, nf4
from umbel_client.models.base.architecture import (
    naming_architecture,
    positions_of,
    require_context,
    vocabulary_of,
)
from umbel_client.models.base.folder import build_base, read_base
from umbel_client.models.base.layers import (
    body_of,
    layers_of,
    lower_part,
    made_up_inputs,
    output_is_plain,
    output_layer,
    splits,
    upper_part,
)
from umbel_client.models.base.placement import AsComputed, Quantisation
from umbel_client.models.base.precision import Precision, computing, lower_precision
from umbel_client.models.base.spread import pass_between_devices, require_exact_copies
from umbel_client.models.inputs import (
    HiddenInputs,
    Inputs,
    PooledInputs,
    TokenInputs,
    whole_rows,
)
from umbel_client.models.token_loss import token_losses
from umbel_common.adapters.vector import Vector
from umbel_common.errors import ModelError
from umbel_common.plans.plan import CausalLm, Classification, Tensor, TrainingPlan
from umbel_host.files.model_digest import require_digest
from umbel_host.files.model_folder import FileDigests


class AdaptedModel(nn.Module):
    """A frozen base model, its LoRA layers and its head; always in evaluation mode.

    Dropout never runs in training, so that a step is a function of batch and noise alone.

    It may have copies on other devices, which always have its adapter: a step divides its records
    among them (`umbel_client.tasks.physical_batches`).
    """

    def __init__(
        self,
        base: PreTrainedModel,
        head: nn.Linear | None,
        parameters: dict[str, nn.Parameter],
        plan: TrainingPlan,
        precision: Precision,
        files: FileDigests,
        *,
        checkpointing: bool = False,
    ) -> None:
        """Use `load`."""
        super().__init__()
        self.base = base
        self.device = base.device
        """The device where the model computes; of several the first one, where its outputs are."""
        self.head = head
        self.adapter = parameters
        """Trained parameters by the plan's names, in its order."""
        self.plan = plan
        self.precision: Precision = precision
        self.files = files
        """Digests of the base model's files, for what else is loaded from its folder."""
        self.depth = _first_adapted_layer(base, plan)
        """The layers below this one are frozen."""
        if precision == "bfloat16":
            lower_precision(base)
        with computing(precision, base.device):
            self.frozen_output: Literal["pooled", "hidden", "nothing"] = self._frozen_output()
            """The output that is constant for each record and can be cached: the `pooled` vector,
            the `hidden` states below `depth`, or `nothing` (the model cannot be split, its first
            layer is adapted, or float16 does not hold the hidden states of a made-up record)."""
            self._plain_output = isinstance(plan.task, CausalLm) and output_is_plain(base)
        self._checkpointed: list[nn.Module] = []
        # A tuple, whose modules are no parts of this one.
        self._others: tuple[AdaptedModel, ...] = ()
        self.eval()
        if self.frozen_output == "hidden" and not self._fits_float16():
            self.frozen_output = "nothing"
        if checkpointing:
            self._enable_checkpointing()

    @classmethod
    def load(
        cls,
        folder: Path,
        plan: TrainingPlan,
        *,
        device: str | tuple[str, ...] = "cpu",
        precision: Precision = "float32",
        checkpointing: bool = False,
        quantisation: Quantisation = "none",
    ) -> "AdaptedModel":
        """The plan's model, with an adapter that `set_vector` must fill before use.

        Args:
            device: several: the layers are spread over them, and all else is on the first.
            precision: of the frozen layers; `fastest_precision` where speed counts.
            checkpointing: whether activations are computed again in the backward pass, which saves
                memory.
            quantisation: of the frozen layers' weights.

        Raises:
            ModelError: the folder is incomplete, or has another digest or other tensors than the
                plan says; or the model mixes records, or cannot be spread over several devices; or
                copies between devices are not exact.
        """
        # On its device before PEFT adds layers: tensors that move later are not trained.
        names = (device,) if isinstance(device, str) else device
        placement = AsComputed(tuple(map(torch.device, names)), precision, quantisation)
        require_exact_copies(placement.devices)
        content = read_base(folder, plan.task, placement)
        require_digest(folder, content.digest, plan.model)
        base, files = build_base(content, plan.task), content.files
        del content  # it would keep tensors that are lowered or quantised below
        require_context(folder, base, plan.task)
        if quantisation == "nf4":
            nf4.quantise(base, torch.bfloat16 if precision == "bfloat16" else torch.float32)
        elif quantisation == "int8":
            int8.quantise(base)
        with naming_architecture(base):
            parameters, head = attach(folder, base, plan.task, plan.lora)
            require_tensors(folder, parameters, plan.lora)
            pass_between_devices(base)
            ordered = {tensor.name: parameters[tensor.name] for tensor in plan.lora.tensors}
            return cls(base, head, ordered, plan, precision, files, checkpointing=checkpointing)

    def follow(self, plan: TrainingPlan) -> None:
        """Takes another plan for the same adapter: other training or other privacy.

        Raises:
            ModelError: the plan is for another base model, task or adapter.
        """
        here, there = ((p.model.digest, p.task, p.lora) for p in (self.plan, plan))
        if here != there:
            raise ModelError(
                "a loaded model cannot follow a plan for another model, task or adapter",
                found=plan.job,
                accepted=f"a plan that differs from {self.plan.job} in training or privacy alone",
            )
        for copy in self.copies:
            copy.plan = plan

    @property
    def copies(self) -> tuple["AdaptedModel", ...]:
        """This model, and after it its copies on other devices."""
        return (self, *self._others)

    def add_copies(self, others: Iterable["AdaptedModel"]) -> None:
        """Takes models that were loaded from the same folder for the same plan, as its copies."""
        self._others = tuple(others)

    def in_copies(self, optimizer: torch.optim.Optimizer) -> list[list[nn.Parameter]]:
        """For each other copy, the parameters that an optimizer of this model trains, in order."""
        names = {id(parameter): name for name, parameter in self.adapter.items()}
        trained = [names[id(one)] for group in optimizer.param_groups for one in group["params"]]
        return self.named_in_copies(trained)

    def named_in_copies(self, names: Iterable[str]) -> list[list[nn.Parameter]]:
        """For each other copy, the parameters of these tensors, in order."""
        every = list(names)
        return [[other.adapter[name] for name in every] for other in self._others]

    @torch.no_grad()
    def update_copies(self) -> None:
        """Gives the other copies the values of the parameters that are trained."""
        for other in self._others:
            for name, parameter in self.adapter.items():
                if parameter.requires_grad:
                    other.adapter[name].copy_(parameter)

    @property
    def vocabulary(self) -> int:
        """Number of tokens that the model knows: each id is smaller."""
        return vocabulary_of(self.base)

    @property
    def positions(self) -> int | None:
        """Number of tokens that the model can read at once; None: any."""
        return positions_of(self.base)

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """The devices of the model's parameters; the first one is `device`. Those of other copies
        are not among them."""
        return tuple(dict.fromkeys([self.device, *(one.device for one in self.parameters())]))

    def train(self, mode: bool = True) -> "AdaptedModel":
        """Keeps the model in evaluation mode, whatever `mode` is."""
        super().train(False)
        for layer in self._checkpointed:
            layer.training = True
        return self

    def set_vector(self, vector: Vector) -> None:
        """Takes float32[plan.lora.size] as the whole adapter.

        Raises:
            PlanError: the vector has another length.
        """
        for copy in self.copies:
            fill(copy.adapter, vector, self.plan.lora)

    def vector(self) -> Vector:
        """The whole adapter, float32[plan.lora.size]."""
        return self.values(self.plan.lora.tensors)

    def values(self, tensors: tuple[Tensor, ...]) -> Vector:
        """Some tensors of the adapter as one vector, float32[n], in the given order."""
        parameters = [self.adapter[tensor.name].detach().reshape(-1) for tensor in tensors]
        # One copy from the device: for each copy, the host would wait once more.
        vector: Vector = torch.cat([one.to(self.device) for one in parameters]).cpu().numpy()
        return vector

    def select(self, round_number: int) -> dict[str, nn.Parameter]:
        """Selects exactly the parameters of a round for training, and returns them by name."""
        names = [tensor.name for tensor in self.plan.trained_tensors(round_number)]
        for copy in self.copies:
            for name, parameter in copy.adapter.items():
                parameter.requires_grad_(name in names)
                parameter.grad = None
        return {name: self.adapter[name] for name in names}

    def logits(self, inputs: Inputs) -> torch.Tensor:
        """The logits of n records, float32[n, labels]."""
        match inputs:
            case PooledInputs(pooled):
                return self._head(pooled.to(self.device))
            case HiddenInputs(hidden, mask):
                mask = mask.to(self.device)
                with upper_part(self.base, self.depth):
                    output = self._run(self.base, mask, inputs_embeds=hidden)
            case TokenInputs(ids, mask):
                mask = mask.to(self.device)
                output = self._run(self.base, mask, input_ids=ids)
        return output if self.head is None else self._head(_pool(output, mask))

    def next_token_losses(
        self, inputs: Inputs, chosen: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        """Cross entropy of a causal language model's next tokens in nats, float32[m].

        Args:
            chosen: bool[n, t - 1] on the CPU, which tokens but the last are predicted from; m of
                them. The others cost nothing above the last layer.
            targets: int64[m], the tokens that follow them.
        """
        assert not isinstance(inputs, PooledInputs)  # they belong to a classification's head
        mask = inputs.mask.to(self.device)
        module = body_of(self.base) if self._plain_output else self.base
        if isinstance(inputs, HiddenInputs):
            with upper_part(self.base, self.depth):
                output = self._run(module, mask, inputs_embeds=inputs.hidden)
        else:
            output = self._run(module, mask, input_ids=inputs.ids)
        # Found on the host, which would otherwise wait for a device to count them.
        places = nn.functional.pad(chosen, (0, 1)).flatten().nonzero()[:, 0]
        rows = output.flatten(0, 1)[places.to(self.device)]
        targets = targets.to(self.device)
        if not self._plain_output:
            return cross_entropy(rows, targets, reduction="none")
        layer = output_layer(self.base)
        assert layer is not None  # the output is plain
        with computing(self.precision, self.device):
            return token_losses(rows, layer, targets)

    @torch.no_grad()
    def frozen_forward(self, inputs: TokenInputs) -> torch.Tensor:
        """The frozen output: float32[n, hidden size] if pooled, else float32[n, t, hidden size]."""
        if self.frozen_output == "pooled":
            return self.pooled(inputs)
        mask = inputs.mask.to(self.device)
        with lower_part(self.base, self.depth):
            return self._run(body_of(self.base), mask, input_ids=inputs.ids)

    @torch.no_grad()
    def pooled(self, inputs: TokenInputs) -> torch.Tensor:
        """The vectors that a mean-pool head reads, float32[n, hidden size], at unit length."""
        mask = inputs.mask.to(self.device)
        return _pool(self._run(self.base, mask, input_ids=inputs.ids), mask)

    def _run(self, module: nn.Module, mask: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        """Logits or last hidden state, float32."""
        arguments = {name: value.to(self.device) for name, value in inputs.items()}
        with computing(self.precision, self.device):
            output = module(attention_mask=mask, **arguments)
        first: torch.Tensor = output[0]
        return first.to(self.device).float()

    def _head(self, pooled: torch.Tensor) -> torch.Tensor:
        task = self.plan.task
        assert self.head is not None  # pooled vectors belong to the mean-pool head
        assert isinstance(task, Classification)
        scaled = pooled * task.logit_scale
        # Where gradients are kept apart, the fused layer does the same with both of its products.
        logits: torch.Tensor = self.head(scaled if torch.is_grad_enabled() else whole_rows(scaled))
        return logits[: len(pooled)]

    def _frozen_output(self) -> Literal["pooled", "hidden", "nothing"]:
        if not self.plan.lora.target_modules and self.head is not None:
            return "pooled"
        if self.depth > 0 and splits(self.base, self.depth):
            return "hidden"
        return "nothing"

    def _fits_float16(self) -> bool:
        """Whether float16 holds the frozen output: a site's own records must not decide it."""
        output = self.frozen_forward(TokenInputs(*made_up_inputs(self.base)))
        return bool(torch.isfinite(output.half()).all())

    @torch.no_grad()
    def _enable_checkpointing(self) -> None:
        """Lets each layer compute its activations again in the backward pass.

        A layer does so only in training mode; the modules inside it stay in evaluation mode.

        Raises:
            ModelError: the architecture does not offer it, or a layer is random in that mode.
        """
        ids, mask = made_up_inputs(self.base)
        with computing(self.precision, self.device):
            before = self.base(input_ids=ids, attention_mask=mask)[0]
        if self.base.supports_gradient_checkpointing:
            self.base.activation_checkpointing_enable({"use_reentrant": False})
        self._checkpointed = [
            module
            for module in self.base.modules()
            if isinstance(module, GradientCheckpointingLayer)
        ]
        self.eval()
        with torch.enable_grad(), computing(self.precision, self.device):
            after = self.base(input_ids=ids, attention_mask=mask)[0]
        if not self._checkpointed or not torch.equal(before, after):
            raise ModelError(
                "a base model cannot compute its activations again in the backward pass",
                field="model.gradient_checkpointing",
                found=type(self.base).__name__,
                accepted="false",
            )


def _pool(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of the token vectors at unit length, as in Sentence-Transformers (Reimers 2019)."""
    weights = mask.to(hidden.dtype).unsqueeze(-1)
    mean = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1.0)
    return nn.functional.normalize(mean, dim=-1)


def _first_adapted_layer(base: PreTrainedModel, plan: TrainingPlan) -> int:
    """Index of the lowest layer with an adapter; the number of layers if only a head is trained."""
    layers = layers_of(base)
    if layers is None:
        return 0
    lowest = len(layers)
    for tensor in plan.lora.tensors:
        if tensor.role != "head" and ".pooler." not in tensor.name:
            match = re.search(r"\.(?:encoder\.layer|layers)\.(\d+)\.", tensor.name)
            lowest = min(lowest, int(match.group(1)) if match else 0)
    return lowest
