"""A look at a base model when a plan is made: whether sites can train what the plan says.

It needs no record, and of the weights only their names and shapes. The model is built with made-up
weights, of which it computes made-up records: what is found depends on the architecture, the
tokenizer and the plan alone. A large model is cut to the first layers that show each kind of layer
it has, and records are as long as the work allows; the look says so.

What it does not prove is left to the sites, which test the real model before the first round:
that the weights are sound, that the model fits into memory, and its bits on their devices.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from umbel_client.data.chat import Chat
from umbel_client.data.tokens import Tokens, load_tokenizer
from umbel_client.dpsgd.fused import NotSeparate
from umbel_client.dpsgd.gradient_sum import take_gradients
from umbel_client.dpsgd.per_record import per_record_gradients
from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.models.adapters.lora import attach, tensors_of, without_targets
from umbel_client.models.adapters.targets import layer_lists
from umbel_client.models.base.architecture import (
    naming_architecture,
    positions_of,
    require_context,
    vocabulary_of,
)
from umbel_client.models.base.layers import TOLERANCE, made_up_inputs, output_layer
from umbel_client.models.base.made_up import made_up_base
from umbel_client.models.base.skeleton import skeleton
from umbel_client.tasks.prepared import PreparedData
from umbel_client.tasks.shapes import Part
from umbel_client.tasks.task import made_up_labels, task_of
from umbel_client.training.blind_test import blind_test
from umbel_client.training.self_test import separation_test
from umbel_common.errors import ModelError
from umbel_common.plans.plan import CausalLm, Classification, DifferentialPrivacy, TrainingPlan

_RECORDS = 2
_WORK = 1e11
"""Largest number of operations of the longest step: seconds of a processor."""
_SHORTEST = 16
_FEW_TOKENS = 1024


@dataclass(frozen=True)
class Look:
    """What was looked at."""

    layers: int
    """Number of layers of the model that were tried, from the first."""
    all_layers: int
    tokens: int
    """Length of the longest record that was tried."""
    max_tokens: int
    """The plan's."""

    @property
    def whole(self) -> bool:
        """Whether all layers were tried, at the plan's greatest length."""
        return self.layers == self.all_layers and self.tokens == self.max_tokens


def look_at(folder: Path, plan: TrainingPlan) -> Look:
    """Looks at the folder's model as this plan uses it.

    Raises:
        ModelError: the tokenizer or its template does not fit the model, the model cannot read as
            many tokens as the plan allows, a language model reads ahead, the weights lack a tensor,
            the model cannot compute a record, or, in a private plan, records have no gradients of
            their own: the error names the trained tensor.
    """
    whole = skeleton(folder, plan.task)
    with naming_architecture(whole):
        require_context(folder, whole, plan.task)
        require_vocabulary(folder, load_tokenizer(folder), vocabulary_of(whole))
        if isinstance(plan.task, CausalLm):
            Chat.load(folder, plan.task).require_one_prompt()
        depth, tokens = _bounds(folder, whole, plan)
        base = made_up_base(folder, plan.task, depth)
        if depth is not None:
            _leave_few_tokens(base)
        if isinstance(plan.task, CausalLm):
            _require_no_look_ahead(folder, base)
        model = _made_up_model(folder, base, plan, tokens, cut=depth is not None)
        _try_steps(model)
        if isinstance(plan.privacy, DifferentialPrivacy):
            # The numbers of a large model's gradients are left to the sites.
            blind_test(model) if depth is not None else separation_test(model, entropy=os.urandom)
    return Look(_depth_of(base), _depth_of(whole), tokens, plan.task.max_tokens)


def describe(folder: Path) -> str:
    """A model in a few words, whatever it is to be trained for.

    Raises:
        ModelError: it cannot be built, or its tokenizer does not fit it.
    """
    base = skeleton(folder, Classification(labels=("a", "b")))
    with naming_architecture(base):
        vocabulary, positions = vocabulary_of(base), positions_of(base)
        require_vocabulary(folder, load_tokenizer(folder), vocabulary)
    most = "any number of tokens" if positions is None else f"up to {positions:,} tokens"
    layers = _depth_of(base)
    return f"{base.config.model_type}, {layers} layers, {vocabulary:,} tokens known, reads {most}"


def require_vocabulary(folder: Path, tokenizer: PreTrainedTokenizerFast, vocabulary: int) -> None:
    """Refuses a tokenizer with tokens of texts that the model has no embedding for.

    A special token beyond the embedding, as for images, is in no text; a record that has it all the
    same is left out. One that fills records up is in every batch.

    Raises:
        ModelError: names a token.
    """
    names = ("eos_token", "bos_token", "cls_token", "sep_token", "pad_token")
    in_records = [getattr(tokenizer, name) for name in names]
    special = {
        number
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special and str(token) not in in_records
    }
    beyond = {
        token: number
        for token, number in tokenizer.get_vocab().items()
        if number >= vocabulary and number not in special
    }
    if beyond:
        token, number = max(beyond.items(), key=lambda item: item[1])
        raise ModelError(
            "the tokenizer of a base model has more tokens than the model knows",
            file=folder,
            found=f"{len(beyond)} tokens beyond the embedding, such as {token!r} ({number})",
            accepted=f"tokens 0 to {vocabulary - 1}",
            remedy="resize the model's embeddings and save it, or use the tokenizer that belongs"
            " to it; a pad_token may be one that the model knows, such as its eos_token",
        )


@torch.no_grad()
def _require_no_look_ahead(folder: Path, base: PreTrainedModel) -> None:
    """Refuses a language model that sees the tokens that it is to learn to write, as encoders do.

    Raises:
        ModelError: an output depends on a later token.
    """
    ids = made_up_inputs(base)[0][:1].repeat(2, 1)
    ids[1, -1] = ids[0, 0]
    logits = base(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
    change = (logits[0, :-1] - logits[1, :-1]).abs().max()
    if change > TOLERANCE * logits.abs().max():
        raise ModelError(
            "a base model reads ahead, so it cannot learn to write answers",
            file=folder,
            field="task",
            found=f"{base.config.model_type}: what it computes for a token depends on later tokens",
            accepted="a decoder (as Llama) for causal-lm",
            remedy="use a decoder, or a classification",
        )


def _bounds(folder: Path, whole: PreTrainedModel, plan: TrainingPlan) -> tuple[int | None, int]:
    """Number of layers, None for all, and length of the longest record."""
    tokens = plan.task.max_tokens
    if _work(whole, tokens) <= _WORK:
        return None, tokens
    depth = _every_kind(whole)
    cut = skeleton(folder, plan.task, depth)
    _leave_few_tokens(cut)
    return depth, min(tokens, max(int(tokens * _WORK / _work(cut, tokens)), _SHORTEST))


def _work(base: PreTrainedModel, tokens: int) -> float:
    """Operations of a step: two for each weight and token forward, four backward."""
    return 6.0 * _RECORDS * tokens * sum(one.numel() for one in base.parameters())


def _leave_few_tokens(base: PreTrainedModel) -> None:
    """Cuts the embedding and the output layer, which in large models take longest of all."""
    embedding: Any = base.get_input_embeddings()
    layers = [embedding, output_layer(base)]
    cut: dict[int, nn.Parameter] = {}
    for layer in layers:
        for name in ("weight", "bias"):
            whole = getattr(layer, name, None)
            if isinstance(whole, nn.Parameter) and len(whole) > _FEW_TOKENS:
                # The same one where the two layers share it.
                part = nn.Parameter(whole.detach()[:_FEW_TOKENS], requires_grad=False)
                setattr(layer, name, cut.setdefault(id(whole), part))
    # It lies beyond the tokens that are left, as a rule.
    embedding.padding_idx = None


def _every_kind(whole: PreTrainedModel) -> int:
    """Number of layers, at least two, among which is one of each kind that the model has."""
    kinds = getattr(whole.config.get_text_config(), "layer_types", None) or []
    depth = 2
    for name in layer_lists(whole):
        seen: set[object] = set()
        for index, layer in enumerate(_children(whole, name)):
            parts = tuple(
                (part, type(module).__name__, tuple(p.shape for p in module.parameters(False)))
                for part, module in layer.named_modules()
            )
            kind = (kinds[index] if index < len(kinds) else None, parts)
            if kind not in seen:
                seen.add(kind)
                depth = max(depth, index + 1)
    return depth


def _depth_of(base: PreTrainedModel) -> int:
    return max((len(_children(base, name)) for name in layer_lists(base)), default=0)


def _children(base: PreTrainedModel, name: str) -> list[nn.Module]:
    return list(base.get_submodule(name).children())


def _made_up_model(
    folder: Path, base: PreTrainedModel, plan: TrainingPlan, tokens: int, *, cut: bool
) -> AdaptedModel:
    """The plan's model on `base`, with an adapter of random values: B = 0 would hide A."""
    lora = plan.lora
    if cut:
        names = [name for name, _ in base.named_modules()]
        there = (t for t in lora.target_modules if any(f".{n}".endswith(f".{t}") for n in names))
        lora = msgspec.structs.replace(lora, layers=None, target_modules=tuple(there))
    parameters, head = attach(folder, base, plan.task, lora)
    lora = msgspec.structs.replace(lora, tensors=tensors_of(parameters))
    task = msgspec.structs.replace(plan.task, max_tokens=tokens)
    model = AdaptedModel(
        base, head, parameters, msgspec.structs.replace(plan, lora=lora, task=task), "float32", {}
    )
    random = np.random.default_rng(0)
    model.set_vector(random.normal(0, 0.05, lora.size).astype(np.float32))
    return model


def _try_steps(model: AdaptedModel) -> None:
    """Computes two made-up records of the greatest length, and their gradients."""
    plan = model.plan
    private = isinstance(plan.privacy, DifferentialPrivacy)
    length = plan.task.max_tokens
    ids = (np.arange(_RECORDS * length) % model.vocabulary).astype(np.int32)
    tokens = Tokens(ids, np.arange(_RECORDS + 1, dtype=np.int64) * length, pad_id=0)
    data = PreparedData(tokens, made_up_labels(plan.task, tokens), prefix=None, longest=length)
    task = task_of(plan.task)

    def losses() -> torch.Tensor:
        with torch.enable_grad():
            part = Part(np.arange(_RECORDS), length, _RECORDS)
            return task.losses(model, task.batch(data, part))

    for round_number in plan.kinds_of_rounds:
        trained = model.select(round_number)
        parameters = list(trained.values())
        if not private:
            found = torch.autograd.grad(losses().sum(), parameters, allow_unused=True)
            for name, gradient in zip(trained, found, strict=True):
                if gradient is None:
                    raise _unused(plan, name)
            continue
        try:
            with per_record_gradients(model):
                losses().sum().backward()  # type: ignore[no-untyped-call]  # torch
                take_gradients(parameters, _RECORDS)
        except NotSeparate as error:
            name = next(n for n, one in trained.items() if one is error.parameter)
            if error.found is None:
                raise _unused(plan, name) from None
            error.field, error.remedy = name, _without(plan, name)
            raise


def _unused(plan: TrainingPlan, name: str) -> ModelError:
    return ModelError(
        "a trained tensor has no part in the model's output",
        field=name,
        found="no gradient",
        remedy=_without(plan, name),
    )


def _without(plan: TrainingPlan, name: str) -> str:
    """What to do about a trained tensor."""
    if ".lora_" not in name:
        return "use another base model, or another task.head"
    layer = name.partition(".lora_")[0]
    targets = [target for target in plan.lora.target_modules if layer.endswith(f".{target}")]
    return without_targets(plan.lora, targets)
