"""Random models of a given shape on one device, and the steps that `gpu_parts.py` compares.

A model is made on its device, in the precision in which it computes: one with 7 billion weights is
never in the host's memory.
"""

import copy
import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    LlamaConfig,
    PreTrainedModel,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask

from umbel_client.data.tokens import Tokens
from umbel_client.dpsgd.per_record import per_record_gradients
from umbel_client.dpsgd.private_step import PrivateOptimizer
from umbel_client.dpsgd.step_noise import StepNoise
from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.models.adapters.lora import attach, tensors_of
from umbel_client.models.base.attention import make_every_mask
from umbel_client.models.base.device import prepare_training
from umbel_client.models.base.nf4 import quantise
from umbel_client.models.base.precision import Precision, computing
from umbel_client.models.inputs import TokenInputs
from umbel_client.tasks.prepared import PreparedData
from umbel_client.tasks.task import made_up_labels, task_of
from umbel_client.training.optimiser import build_optimizer
from umbel_common.plans.plan import (
    Adam,
    Aggregation,
    BaseModel,
    CausalLm,
    Classification,
    LocalPrivacy,
    Lora,
    Task,
    Training,
    TrainingPlan,
)

RANK = 16
NOWHERE = Path("random")
"""In place of the folder of a model."""


class NotHere(Exception):
    """A part cannot run on this device; says what it needs."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a model, and of its records."""

    family: str
    """`llama`, a causal language model; or `bert`, an encoder with a mean-pool head."""
    layers: int
    width: int
    inner: int
    """Width within the feed-forward layers."""
    heads: int
    key_value_heads: int
    vocabulary: int
    tokens: int
    """Tokens of each record."""
    tied: bool = False
    """Whether the output layer shares the embedding's weight."""

    @property
    def task(self) -> Task:
        """The task of its plan."""
        if self.family == "llama":
            return CausalLm(max_tokens=self.tokens)
        return Classification(labels=("a", "b", "c", "d"), max_tokens=self.tokens)

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of all linear layers that may have an adapter."""
        if self.family == "llama":
            attention = ("q_proj", "k_proj", "v_proj", "o_proj")
            return (*attention, "gate_proj", "up_proj", "down_proj")
        return ("query", "key", "value", "dense")


SHAPES = {
    "7b": Shape("llama", 32, 4096, 11008, 32, 32, 32_000, 1024),
    "1b": Shape("llama", 16, 2048, 8192, 32, 8, 128_256, 1024, tied=True),
    "bert_large": Shape("bert", 24, 1024, 4096, 16, 16, 30_522, 512),
    "small_llama": Shape("llama", 4, 256, 704, 4, 2, 1000, 128),
    "small_bert": Shape("bert", 4, 256, 1024, 4, 4, 1000, 128),
    "wide": Shape("llama", 4, 1024, 4096, 16, 16, 1000, 1024),
}


def shape_of(name: str, *, tiny: bool) -> Shape:
    """A shape by its name; tiny: of the same family, for a test of the program."""
    shape = SHAPES[name]
    if not tiny:
        return shape
    return replace(
        shape, layers=2, width=32, inner=48, heads=2, key_value_heads=1, vocabulary=50, tokens=24
    )


class Device:
    """A device, its clock and its memory."""

    def __init__(self, name: str) -> None:
        self._pretended: Any = None
        if name.startswith("pretend"):
            # Only now: it changes what PyTorch knows of devices.
            from support import pretended

            self._pretended = pretended.MEMORY[name]
        self.name = name
        self.place = torch.device(name)
        self.is_cuda = self.place.type == "cuda"

    @property
    def has_memory(self) -> bool:
        """Whether it counts what is allocated."""
        return self.is_cuda or self._pretended is not None

    def synchronize(self) -> None:
        """Waits until everything is computed."""
        if self.is_cuda:
            torch.cuda.synchronize(self.place)

    def held(self) -> int:
        """Bytes that tensors hold now."""
        gc.collect()
        if self._pretended is not None:
            return int(self._pretended.used)
        return torch.cuda.memory_allocated(self.place) if self.is_cuda else 0

    def watch_peak(self) -> None:
        """Forgets the peak so far."""
        if self._pretended is not None:
            self._pretended.peak = self._pretended.used
        elif self.is_cuda:
            torch.cuda.reset_peak_memory_stats(self.place)

    def peak(self) -> int:
        """The most bytes that tensors held since `watch_peak`."""
        if self._pretended is not None:
            return int(self._pretended.peak)
        return torch.cuda.max_memory_allocated(self.place) if self.is_cuda else 0

    def free(self) -> None:
        """Gives back what no tensor holds."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()

    @contextmanager
    def with_room(self, size: int) -> Iterator[None]:
        """Within the context, the device has no more than about `size` bytes left.

        On a GPU the rest is taken by a tensor, so that it is the driver that refuses memory.
        """
        if self._pretended is not None:
            from support import pretended

            with pretended.memory_of(size, self.name):
                yield
            return
        self.free()
        filler = torch.empty(
            max(torch.cuda.mem_get_info(self.place)[0] - size, 0),
            dtype=torch.uint8,
            device=self.place,
        )
        try:
            yield
        finally:
            del filler
            self.free()


def as_a_site(device: Device) -> None:
    """Makes this process compute as a site's trainer does under differential privacy."""
    prepare_training(device.place, private=True)
    make_every_mask()


def as_stock() -> None:
    """Makes this process compute as PyTorch and Transformers do by themselves."""
    torch.use_deterministic_algorithms(False)
    for name, make in {"sdpa": sdpa_mask, "eager": eager_mask}.items():
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, make)


def random_base(shape: Shape, device: Device, dtype: torch.dtype) -> PreTrainedModel:
    """A frozen model in one precision, the same each time."""
    sizes: dict[str, Any] = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "max_position_embeddings": shape.tokens,
        "pad_token_id": 0,
    }
    config: Any
    if shape.family == "llama":
        grouped = {"num_key_value_heads": shape.key_value_heads, "use_cache": False}
        config = LlamaConfig(**sizes, **grouped, tie_word_embeddings=shape.tied)
        factory: Any = AutoModelForCausalLM
    else:
        config, factory = BertConfig(**sizes), AutoModel
    torch.manual_seed(1)
    # The pretended device has no random numbers of its own.
    with torch.device(device.place if device.is_cuda else "cpu"):
        base: PreTrainedModel = factory.from_config(config, dtype=dtype)
    if shape.family == "bert":
        base.pooler = None  # as a site does where mean pooling is used
    base.to(device.place)
    base.requires_grad_(False)
    return base.eval()


def linear_weights(base: nn.Module) -> dict[int, nn.Parameter]:
    """The parameters of linear layers, by their identity: a `memo` with which copies share them."""
    layers = [module for module in base.modules() if isinstance(module, nn.Linear)]
    return {id(one): one for layer in layers for one in layer.parameters(recurse=False)}


def apart(base: PreTrainedModel) -> PreTrainedModel:
    """The same model as a site holds it beside the linear layers, which both share: in float32."""
    shared = linear_weights(base)
    own = copy.deepcopy(base, dict(shared))
    for module in own.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in shared:
                setattr(module, name, nn.Parameter(parameter.float(), requires_grad=False))
    return own


def adapted(
    shape: Shape,
    base: PreTrainedModel,
    *,
    precision: Precision,
    checkpointing: bool = False,
) -> AdaptedModel:
    """The model that a site trains, around a base model that is there."""
    lora = _lora(shape)
    parameters, head = attach(NOWHERE, base, shape.task, lora)
    plan = TrainingPlan(
        federation="gpu-check",
        job="gpu-check",
        model=BaseModel(name="random", digest=bytes(32)),
        task=shape.task,
        lora=msgspec.structs.replace(lora, tensors=tensors_of(parameters)),
        training=Training(
            rounds=1,
            local_steps=1,
            expected_batch_size=8,
            optimizer=Adam(adapter_learning_rate=1e-4, head_learning_rate=1e-4),
        ),
        privacy=LocalPrivacy(epsilon=8.0, delta=1e-5, clip_norm=1.0),
        aggregation=Aggregation(threshold=2, clip_range=1.0, step=1e-6),
    )
    return AdaptedModel(base, head, parameters, plan, precision, {}, checkpointing=checkpointing)


def _lora(shape: Shape) -> Lora:
    """Rank 16 in all linear layers, both matrices trained."""
    return Lora(
        rank=RANK,
        alpha=2.0 * RANK,
        target_modules=shape.targets,
        layers=None,
        method="both",
        seed=1,
        tensors=(),
    )


def set_random(model: AdaptedModel) -> None:
    """Fills the adapter with small random numbers: with B zero, A would have no gradient."""
    random = np.random.default_rng(2)
    model.set_vector(random.normal(0, 0.02, model.plan.lora.size).astype(np.float32))


def records(model: AdaptedModel, lengths: list[int]) -> PreparedData:
    """Random records of these lengths, of which every token counts."""
    random = np.random.default_rng(3)
    ids = random.integers(1, model.vocabulary, sum(lengths)).astype(np.int32)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = Tokens(ids, starts, 0)
    task = model.plan.task
    return PreparedData(tokens, made_up_labels(task, tokens), None, longest=task.max_tokens)


class PrivateSteps:
    """A site's steps on one physical batch of records that fill their length."""

    def __init__(self, model: AdaptedModel, device: Device, stack: ExitStack) -> None:
        self._model, self._device = model, device
        plan = model.plan
        assert isinstance(plan.privacy, LocalPrivacy)
        trained = model.select(1)
        adam = build_optimizer(plan, plan.trained_tensors(1), trained, 1.0)
        parameters = [one for group in adam.param_groups for one in group["params"]]
        self._noise = stack.enter_context(StepNoise(os.urandom, parameters, steps=1 << 20))
        stack.enter_context(per_record_gradients(model))
        self._private = PrivateOptimizer(
            adam,
            self._noise,
            noise_multiplier=1.0,
            clip_norm=plan.privacy.clip_norm,
            expected_batch_size=float(plan.training.expected_batch_size),
        )

    def enter(self) -> None:
        """Makes the process compute as this kind of step needs it."""
        as_a_site(self._device)

    def leave(self) -> None:
        """Waits for what this kind of step does beside the device."""
        self._noise.wait()

    def discard(self) -> None:
        """Drops what a step that ran out of memory has left."""
        self._private.discard()

    def step(self, count: int) -> None:
        """Takes a step on so many records; not in smaller parts where memory runs out."""
        task = task_of(self._model.plan.task)
        data = records(self._model, [self._model.plan.task.max_tokens] * count)
        part = data.part(np.arange(count))
        with torch.enable_grad():
            losses = task.losses(self._model, task.batch(data, part))
            losses.sum().backward()
        self._private.accumulate(count)
        self._private.step()


class StockSteps:
    """The same without privacy: PEFT's layers, Transformers' loss, and Adam."""

    def __init__(
        self, shape: Shape, base: PreTrainedModel, device: Device, precision: Precision
    ) -> None:
        parameters, self._head = attach(NOWHERE, base, shape.task, _lora(shape))
        self._shape, self._base, self._device = shape, base, device
        self._precision: Precision = precision
        self._adam = torch.optim.Adam(parameters.values(), lr=1e-4)

    def enter(self) -> None:
        """Makes the process compute as this kind of step needs it."""
        as_stock()

    def leave(self) -> None:
        """Does nothing: all of a step is on the device."""

    def discard(self) -> None:
        """Drops what a step that ran out of memory has left."""
        self._adam.zero_grad()

    def step(self, count: int) -> None:
        """Takes a step on so many records."""
        random = np.random.default_rng(3)
        drawn = random.integers(1, self._shape.vocabulary, (count, self._shape.tokens))
        ids = torch.from_numpy(drawn).to(self._device.place)
        mask = torch.ones_like(ids)
        with torch.enable_grad(), computing(self._precision, self._device.place):
            if self._head is None:
                loss = self._base(input_ids=ids, attention_mask=mask, labels=ids).loss
            else:
                hidden = self._base(input_ids=ids, attention_mask=mask)[0]
                labels = torch.arange(count, device=ids.device) % self._head.out_features
                loss = nn.functional.cross_entropy(self._head(hidden.mean(1)), labels)
        loss.backward()
        self._adam.step()
        self._adam.zero_grad()


Steps = PrivateSteps | StockSteps


@dataclass(frozen=True)
class Measured:
    """What a kind of step takes."""

    seconds: float
    """Median over the turns of the mean over a turn's steps."""
    own: int
    """Bytes beside the weights that both kinds share: the adapter and what the optimizer holds."""
    rise: int
    """Bytes that a step needs in addition, at its peak."""


@dataclass(frozen=True)
class Comparison:
    """A site's private steps beside those of stock PEFT, on one model."""

    records: int
    """Records of a step."""
    weights: int
    """Bytes of the weights that both share."""
    private: Measured
    stock: Measured


def compare(
    shape: Shape,
    device: Device,
    *,
    precision: Precision,
    most: int,
    turns: int = 3,
    nf4: bool = False,
    seconds: float = 40.0,
) -> Comparison:
    """Measures both kinds of step in turns, at the largest batch that fits for both.

    Stock PEFT holds the whole model in the precision of the frozen layers; a site holds norms and
    embeddings in float32.

    Args:
        most: records of a step to begin with; halved until they fit.
        seconds: about how long to measure.

    Raises:
        NotHere: the device has no memory for one record.
    """
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    with ExitStack() as stack:
        try:
            # The workspaces of products stay, and belong to neither kind.
            square = torch.ones(64, 64).to(device.place, dtype)
            square @ square
            del square
            held = [device.held()]
            base = random_base(shape, device, dtype)
            if nf4:
                quantise(base, dtype)
            held.append(device.held())
            shared = linear_weights(base)
            unshared = sum(one.nbytes for one in base.parameters() if id(one) not in shared)
            twin = apart(base)
            held.append(device.held())
            stock = StockSteps(shape, base, device, precision)
            stock.enter()
            stock.step(1)
            held.append(device.held())
            private = PrivateSteps(adapted(shape, twin, precision=precision), device, stack)
            private.enter()
            private.step(1)
            held.append(device.held())
        except torch.OutOfMemoryError:
            raise NotHere("needs a device with more memory") from None
        weights, twins, stocks, privates = np.diff(held).tolist()
        count, both = most, (private, stock)
        while not all(_fits(kind, device, count) for kind in both):
            count //= 2
            if count == 0:
                raise NotHere("needs a device with more memory")
        rises = [_rise(kind, device, count) for kind in both]
        once = sum(_seconds(kind, device, count, 1) for kind in both)
        steps = min(max(int(seconds / turns / once) - 1, 1), 4)
        times: list[list[float]] = [[], []]
        for _ in range(turns):
            for kind, found in zip(both, times, strict=True):
                found.append(_seconds(kind, device, count, steps))
        medians = [float(np.median(found)) for found in times]
        return Comparison(
            count,
            weights - unshared,
            Measured(medians[0], twins + privates, rises[0]),
            Measured(medians[1], unshared + stocks, rises[1]),
        )


def _fits(kind: Steps, device: Device, count: int) -> bool:
    kind.enter()
    try:
        kind.step(count)
        device.synchronize()
    except torch.OutOfMemoryError:
        fits = False
    else:
        fits = True
    if not fits:
        kind.discard()
    device.free()
    kind.leave()
    return fits


def _rise(kind: Steps, device: Device, count: int) -> int:
    kind.enter()
    before = device.held()
    device.watch_peak()
    kind.step(count)
    device.synchronize()
    kind.leave()
    return device.peak() - before


def _seconds(kind: Steps, device: Device, count: int, steps: int) -> float:
    """Mean seconds of steps that follow each other, after one that warms up.

    While a private step computes, the noise of the next one is drawn, as in a round.
    """
    kind.enter()
    kind.step(count)
    device.synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        kind.step(count)
    device.synchronize()
    taken = (time.perf_counter() - began) / steps
    kind.leave()
    return taken


def alone_and_together(
    model: AdaptedModel, lengths: list[int]
) -> tuple[torch.Tensor, Callable[[], torch.Tensor]]:
    """Each record's gradient, float32[records, trained elements] on the host.

    Returns:
        The slow truth: each record alone, by PEFT's layers, Transformers' loss and autograd. And
        what computes the same in one pass, as a site does.
    """
    data, task = records(model, lengths), task_of(model.plan.task)
    parameters = list(model.select(1).values())

    def loss_alone(index: int) -> torch.Tensor:
        start, end = data.tokens.starts[index : index + 2]
        ids = torch.from_numpy(data.tokens.ids[start:end].astype(np.int64))[None].to(model.device)
        if isinstance(model.plan.task, CausalLm):
            with computing(model.precision, model.device):
                loss: torch.Tensor = model.base(input_ids=ids, labels=ids).loss
            return loss
        logits = model.logits(TokenInputs(ids, torch.ones_like(ids)))
        label = torch.from_numpy(data.labels[index : index + 1]).to(model.device)
        return nn.functional.cross_entropy(logits, label)

    rows = []
    with torch.enable_grad():
        for index in range(len(lengths)):
            found = torch.autograd.grad(loss_alone(index), parameters)
            rows.append(torch.cat([one.flatten() for one in found]).float().cpu())

    def together() -> torch.Tensor:
        part = data.part(np.arange(len(lengths)))
        with per_record_gradients(model):
            with torch.enable_grad():
                losses = task.losses(model, task.batch(data, part))
                losses.sum().backward()
            holders: list[Any] = list(parameters)
            return torch.cat([one.grad_sample.flatten(1).cpu() for one in holders], 1)

    return torch.stack(rows), together


def largest_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest relative difference of a record's gradient."""
    return float(((found - wanted).norm(dim=1) / wanted.norm(dim=1)).max())
