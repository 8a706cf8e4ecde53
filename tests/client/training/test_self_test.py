"""The start-up self-test passes on sound parts, and names what is wrong with others."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from scipy.stats import chi2
from support.shared_noise_plans import shared_noise_plan
from torch import nn
from transformers import RobertaConfig, RobertaModel

from umbel_client.dpsgd import fused, gradient_sum, integer_sum, private_step
from umbel_client.dpsgd.gradient_sum import Gradients, clip_factors
from umbel_client.dpsgd.integer_sum import IntegerSum
from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.models.adapters.lora import plan_lora
from umbel_client.models.base.precision import Precision
from umbel_client.privacy.discrete_gaussian import DiscreteGaussian
from umbel_client.privacy.noise import NoiseSource
from umbel_client.tasks.shapes import BatchLimit
from umbel_client.training import self_test
from umbel_common.errors import ModelError
from umbel_common.plans.plan import (
    Adam,
    Aggregation,
    BaseModel,
    Classification,
    Clipping,
    LocalPrivacy,
    NoPrivacy,
    Training,
    TrainingPlan,
)
from umbel_host.files.model_digest import folder_digest

torch.set_num_threads(1)

PRIVATE = LocalPrivacy(epsilon=8.0, delta=1e-5, clip_norm=0.5)


def model_of(
    folder: Path,
    *,
    method: str = "both",
    head: str = "mean-pool",
    layers: tuple[int, ...] | None = None,
    targets: tuple[str, ...] = ("query", "value"),
    privacy: LocalPrivacy | NoPrivacy = PRIVATE,
    adapter_learning_rate: float = 1e-3,
    unbiased: bool = False,
    precision: Precision = "float32",
) -> AdaptedModel:
    task = Classification(labels=("a", "b"), head=head, max_tokens=24)
    optimizer = Adam(
        adapter_learning_rate=adapter_learning_rate, head_learning_rate=1e-2, unbiased=unbiased
    )
    plan = TrainingPlan(
        federation="f",
        job="j",
        model=BaseModel(name="tiny", digest=folder_digest(folder)),
        task=task,
        lora=plan_lora(
            folder,
            task,
            rank=2,
            alpha=4.0,
            target_modules=targets,
            layers=layers,
            method=method,
            seed=5,
        ),
        training=Training(rounds=4, local_steps=1, expected_batch_size=8, optimizer=optimizer),
        privacy=privacy,
        aggregation=Aggregation(threshold=2, clip_range=1.0, step=1e-4),
    )
    model = AdaptedModel.load(folder, plan, precision=precision)
    model.set_vector(np.arange(plan.lora.size, dtype=np.float32))
    return model


def run(model: AdaptedModel, noise_multiplier: float | None = 0.7) -> None:
    self_test.self_test(model, noise_multiplier, BatchLimit(4), entropy=os.urandom)


@pytest.mark.parametrize(
    ("precision", "head", "method"),
    [
        *product(["float32"], ["mean-pool", "stock"], ["both", "ffa", "alternate"]),
        ("bfloat16", "mean-pool", "both"),
        ("bfloat16", "stock", "alternate"),
        # The others of the lower precision join what is here.
        *(
            pytest.param("bfloat16", head, method, marks=pytest.mark.full)
            for head, method in product(["mean-pool", "stock"], ["both", "ffa", "alternate"])
            if (head, method) not in (("mean-pool", "both"), ("stock", "alternate"))
        ),
    ],
)
def test_sound_parts_pass_and_the_adapter_is_as_before(
    tiny_model: Path, method: str, head: str, precision: Precision
) -> None:
    model = model_of(tiny_model, method=method, head=head, precision=precision)
    model.select(2)
    before = [(p.detach().clone(), p.requires_grad) for p in model.adapter.values()]
    run(model)
    for parameter, (value, trained) in zip(model.adapter.values(), before, strict=True):
        assert torch.equal(parameter, value)
        assert parameter.requires_grad is trained
        assert parameter.grad is None
        assert not vars(parameter)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    "options", [{"layers": (1,)}, {"targets": ("query", "key", "value", "dense")}, {"targets": ()}]
)
def test_it_passes_with_few_or_many_or_no_adapted_layers(tiny_model: Path, options: dict) -> None:
    run(model_of(tiny_model, **options))


@pytest.mark.parametrize(
    ("precision", "clip_norm"),
    [
        *product(["float32"], [1e-3, 0.5, 100.0]),
        ("bfloat16", 1e-3),
        pytest.param("bfloat16", 0.5, marks=pytest.mark.full),
        pytest.param("bfloat16", 100.0, marks=pytest.mark.full),
    ],
)
def test_it_passes_with_automatic_clipping_and_unbiased_adam(
    tiny_model: Path, clip_norm: float, precision: Precision
) -> None:
    privacy = LocalPrivacy(epsilon=8.0, delta=1e-5, clip_norm=clip_norm, clipping="automatic")
    run(model_of(tiny_model, privacy=privacy, unbiased=True, precision=precision))


@pytest.mark.parametrize(("planned", "used"), [("flat", "automatic"), ("automatic", "flat")])
def test_clipping_by_another_rule_than_the_plans_is_found(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, planned: Clipping, used: Clipping
) -> None:
    monkeypatch.setitem(gradient_sum.CLIPPINGS, planned, gradient_sum.CLIPPINGS[used])
    privacy = LocalPrivacy(epsilon=8.0, delta=1e-5, clip_norm=0.5, clipping=planned)
    with pytest.raises(ModelError, match="not clipped to the clip norm"):
        run(model_of(tiny_model, privacy=privacy))


def test_padding_that_positions_depend_on_is_not_taken_for_a_neighbour(
    tiny_model: Path, tmp_path: Path
) -> None:
    """RoBERTa counts positions by what is not padding, which is token 1."""
    for path in tiny_model.glob("tokenizer*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = RobertaConfig(**sizes, num_hidden_layers=2, vocab_size=40, pad_token_id=1)
    RobertaModel(config).save_pretrained(tmp_path)
    run(model_of(tmp_path))


def test_without_privacy_there_is_nothing_to_test(tiny_model: Path) -> None:
    run(model_of(tiny_model, privacy=NoPrivacy(), adapter_learning_rate=1e-12), None)


class Mixing(nn.Module):
    """Subtracts the mean over the batch, as batch norm does."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden - 0.1 * hidden.mean(0, keepdim=True)


def test_a_layer_that_mixes_the_batch_is_refused(tiny_model: Path) -> None:
    model = model_of(tiny_model)
    before = model.vector()
    layer = model.base.get_submodule("encoder.layer.0.output")
    layer.LayerNorm = nn.Sequential(layer.LayerNorm, Mixing())
    with pytest.raises(ModelError, match="depends on the records beside it"):
        run(model)
    assert np.array_equal(model.vector(), before)


class Padded(nn.Module):
    """Takes the mean over tokens, padding and all."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + hidden.mean(1, keepdim=True)


def test_a_layer_that_looks_at_padding_is_refused(tiny_model: Path) -> None:
    model = model_of(tiny_model)
    layer = model.base.get_submodule("encoder.layer.1.output")
    layer.LayerNorm = nn.Sequential(layer.LayerNorm, Padded())
    with pytest.raises(ModelError, match="depends on the records beside it"):
        run(model)


class Flattening(nn.Module):
    """Runs a layer over tokens as if they were records, as models that unpad do."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.layer(hidden.flatten(0, 1)).view(*hidden.shape[:-1], -1)


def test_a_layer_that_flattens_the_batch_is_refused(tiny_model: Path) -> None:
    model = model_of(tiny_model)
    attention = model.base.get_submodule("encoder.layer.0.attention.self")
    attention.query = Flattening(attention.query)
    with pytest.raises(ModelError, match="not separate"):
        run(model)


def test_a_tensor_that_the_model_does_not_use_is_named(tiny_model: Path) -> None:
    """As in opacus issue 820."""
    model = model_of(tiny_model)
    name = next(name for name in model.adapter if "lora_B" in name)
    model.adapter[name] = nn.Parameter(model.adapter[name].detach().clone())
    with pytest.raises(ModelError, match="no part in the model's output") as caught:
        run(model)
    assert caught.value.found == name


def test_gradients_of_the_wrong_records_are_found(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = fused._by_record
    monkeypatch.setattr(fused, "_by_record", lambda g, x: sound(g, x).roll(1, 0))
    with pytest.raises(ModelError, match="depends on the records beside it"):
        run(model_of(tiny_model))


@pytest.mark.parametrize("factor", [1.1, 0.5, 100.0])
def test_clipping_to_another_norm_is_found(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    sound = private_step.clipped_sum
    monkeypatch.setattr(
        private_step, "clipped_sum", lambda g, u, norm, how: sound(g, u, factor * norm, how)
    )
    with pytest.raises(ModelError, match="not clipped to the clip norm"):
        run(model_of(tiny_model))


@pytest.mark.parametrize("targets", [("query", "value"), ()])
@pytest.mark.parametrize("factor", [0.95, 1.05, 0.0])
def test_noise_of_another_scale_is_found(
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    targets: tuple[str, ...],
    factor: float,
) -> None:
    sound = NoiseSource.fill

    def scaled(self: NoiseSource, draws: np.ndarray) -> None:
        sound(self, draws)
        draws *= factor

    monkeypatch.setattr(NoiseSource, "fill", scaled)
    with pytest.raises(ModelError, match="noise is not the one"):
        run(model_of(tiny_model, targets=targets))


def test_sound_noise_is_refused_less_than_once_in_a_million() -> None:
    draws = self_test.DRAWS
    spread = 2 * np.sqrt(self_test.ALARM / draws)
    above = chi2.sf(draws * (1 + spread + 2 * self_test.ALARM / draws), draws)
    below = chi2.cdf(draws * (1 - spread), draws)
    assert above + below < 2 * np.exp(-self_test.ALARM) < 1e-6


def test_an_optimiser_that_does_not_move_the_adapter_is_refused(tiny_model: Path) -> None:
    with pytest.raises(ModelError, match="left the adapter as it was") as caught:
        run(model_of(tiny_model, adapter_learning_rate=1e-12))
    assert "lora_A" in str(caught.value.found)
    assert "head" not in str(caught.value.found)


def sharing_model(folder: Path, *, clipping: Clipping = "flat") -> AdaptedModel:
    """A model of a plan whose sites share their noise."""
    model = model_of(folder)
    plan = shared_noise_plan(model.plan, sampling_rate=1.0, attempts=4)
    privacy = msgspec.structs.replace(plan.privacy, clipping=clipping)
    model = AdaptedModel.load(folder, msgspec.structs.replace(plan, privacy=privacy))
    model.set_vector(np.arange(plan.lora.size, dtype=np.float32))
    return model


@pytest.mark.parametrize("clipping", ["flat", pytest.param("automatic", marks=pytest.mark.full)])
def test_sound_parts_of_distributed_mode_pass(tiny_model: Path, clipping: Clipping) -> None:
    model = sharing_model(tiny_model, clipping=clipping)
    before = model.vector()
    run(model)
    assert np.array_equal(model.vector(), before)


def _sum_of(rounded: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    """`IntegerSum._part` with another rounding: of float64[units, elements] to [elements]."""

    def part(
        self: IntegerSum, gradients: Gradients, units: np.ndarray | None
    ) -> dict[torch.device, torch.Tensor]:
        gradients, factors = clip_factors(gradients, units, self._clip_norm, self._clipping)
        steps = (factors / self._grid).unsqueeze(1)
        return {
            device: torch.cat([rounded(rows.double() * steps) for rows in there])
            for device, there in gradients.items()
        }

    return part


@pytest.mark.parametrize(
    ("rounded", "told"),
    [
        pytest.param(lambda rows: rows.round().sum(0), None, marks=pytest.mark.full),
        (lambda rows: rows.sum(0).round(), "rounded one by one"),
        (lambda rows: rows.sum(0), "rounded one by one"),
        (lambda rows: rows.ceil().sum(0), "rounded one by one"),
    ],
    ids=["sound", "a sum is rounded", "nothing is rounded", "rounded up"],
)
def test_rounding_that_the_sensitivity_does_not_hold_for_is_refused(
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    rounded: Callable[[torch.Tensor], torch.Tensor],
    told: str | None,
) -> None:
    monkeypatch.setattr(IntegerSum, "_part", _sum_of(rounded))
    model = sharing_model(tiny_model)
    with nullcontext() if told is None else pytest.raises(ModelError, match=told):
        run(model)


@pytest.mark.parametrize("factor", [1.1, 100.0])
def test_integer_sums_of_records_that_are_not_clipped_are_found(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    monkeypatch.setattr(
        integer_sum, "clip_factors", lambda g, u, norm, how: clip_factors(g, u, factor * norm, how)
    )
    with pytest.raises(ModelError, match="not clipped to the clip norm"):
        run(sharing_model(tiny_model))


@pytest.mark.parametrize("bits", [-1, 1])
def test_integer_noise_of_another_scale_is_found(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, bits: int
) -> None:
    monkeypatch.setattr(
        self_test,
        "DiscreteGaussian",
        lambda source, planned: DiscreteGaussian(source, planned + bits),
    )
    with pytest.raises(ModelError, match="noise is not the one"):
        run(sharing_model(tiny_model))
