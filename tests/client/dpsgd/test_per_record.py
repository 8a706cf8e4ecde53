"""Fused per-record gradients are those of one record at a time, in each family of models."""

import warnings
from collections.abc import Callable
from itertools import product

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from umbel_client.dpsgd.gradient_sum import flat
from umbel_client.dpsgd.per_record import per_record_gradients, plain_lora
from umbel_client.dpsgd.private_step import clipped_sum
from umbel_common.errors import ModelError

torch.set_num_threads(1)

CPU = torch.device("cpu")

LENGTHS = (3, 7, 4, 9, 6)
SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "tie_word_embeddings": True}
DISTILLED = {"vocab_size": 50, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 4}
GPT2 = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}

FAMILIES: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "BERT and MiniLM": (
        lambda: transformers.BertModel(transformers.BertConfig(**SIZES), add_pooling_layer=False),
        ["query", "value"],
    ),
    "RoBERTa": (
        lambda: transformers.RobertaModel(
            transformers.RobertaConfig(**SIZES, pad_token_id=1), add_pooling_layer=False
        ),
        ["query", "value"],
    ),
    "DistilBERT": (
        lambda: transformers.DistilBertModel(transformers.DistilBertConfig(**DISTILLED)),
        ["q_lin", "v_lin"],
    ),
    "Llama": (
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
        ["q_proj", "v_proj"],
    ),
    "SmolLM2": (
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED)),
        ["q_proj", "v_proj"],
    ),
    "Qwen2": (
        lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**GROUPED)),
        ["q_proj", "v_proj"],
    ),
    "GPT-2": (
        lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)),
        ["c_attn"],
    ),
}
every_family = pytest.mark.parametrize("family", FAMILIES)
every_family_and_every_matrix = pytest.mark.parametrize(
    ("family", "trains"),
    [
        # Where a matrix rests is decided by layer, and each kind of layer is in one of these.
        pytest.param(family, trains, marks=[pytest.mark.full] if rare else [])
        for family, trains in product(FAMILIES, ("AB", "A", "B"))
        for rare in [trains != "AB" and family not in ("Llama", "GPT-2")]
    ],
)


def adapted(family: str, targets: str = "all-linear", trains: str = "AB", **lora) -> nn.Module:
    """A random model of the family, evaluating, with a random adapter of rank 3."""
    torch.manual_seed(1)
    build, attention = FAMILIES[family]
    base = build()
    base.config.pad_token_id = 1
    chosen = targets if targets == "all-linear" else attention
    with warnings.catch_warnings():
        # PEFT asks Transformers for a property by its old name, and turns Conv1D's weights itself.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`|fan_in_fan_out")
        model = get_peft_model(base, LoraConfig(r=3, lora_alpha=5, target_modules=chosen, **lora))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
            parameter.requires_grad_(any(f"lora_{matrix}" in name for matrix in trains))
    return model.eval()


def batch(indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask of some records, padded to the longest of them."""
    longest = max(LENGTHS[index] for index in indices)
    ids = torch.ones(len(indices), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, index in enumerate(indices):
        length = LENGTHS[index]
        random = torch.Generator().manual_seed(index)
        ids[row, :length] = torch.randint(4, 50, (length,), generator=random)
        mask[row, :length] = 1
    return ids, mask


def losses(model: nn.Module, indices: list[int]) -> torch.Tensor:
    """For each record the mean over its own tokens, of the next token's cross entropy if any."""
    ids, mask = batch(indices)
    output = model(input_ids=ids, attention_mask=mask)[0].float()
    if output.shape[-1] == 50:
        weights = mask[:, 1:].float()
        values = cross_entropy(output[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    else:
        weights = mask.float()
        values = (output**3).mean(-1)
    # Very unequal records, so that some are clipped.
    scale = torch.tensor([4.0 ** (index - 2) for index in indices])
    return scale * (values * weights).sum(1) / weights.sum(1)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def one_at_a_time(model: nn.Module, loss: Callable = losses) -> torch.Tensor:
    """Gradients of each record by torch and PEFT alone: [records, trained elements]."""
    rows = []
    for index in range(len(LENGTHS)):
        gradients = torch.autograd.grad(loss(model, [index]).sum(), trained(model))
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return torch.stack(rows)


def together(model: nn.Module, loss: Callable = losses) -> torch.Tensor:
    """The same in one pass."""
    every = list(range(len(LENGTHS)))
    with per_record_gradients(model):
        loss(model, every).sum().backward()
        found = [parameter.grad_sample for parameter in trained(model)]
        assert all(rows.dtype == torch.float32 for rows in found)
        assert all(parameter.grad is None for parameter in model.parameters())
    return torch.cat([rows.flatten(1) for rows in found], dim=1)


def largest_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(((found - wanted).norm(dim=1) / wanted.norm(dim=1)).max())


@pytest.mark.parametrize(
    "targets",
    # Some of the layers that are adapted together in the other case.
    [pytest.param("attention", marks=pytest.mark.full), "all-linear"],
)
@every_family_and_every_matrix
def test_each_family_has_the_gradients_of_records_taken_alone(
    family: str, targets: str, trains: str
) -> None:
    model = adapted(family, targets, trains)
    wanted = one_at_a_time(model)
    assert largest_error(together(model), wanted) < 1e-5
    # Each layer is one of its own: none went past the fused route.
    layers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert len(layers) >= 2
    assert all(plain_lora(layer) is not None for layer in layers)


@every_family
def test_clipped_sums_are_those_of_records_taken_alone(family: str) -> None:
    model = adapted(family)
    wanted = one_at_a_time(model)
    norms = wanted.norm(dim=1, keepdim=True)
    clip_norm = float(norms.median())
    assert norms.min() < clip_norm < norms.max()
    total = (wanted * (clip_norm / norms).clamp(max=1)).sum(0)
    with per_record_gradients(model):
        losses(model, list(range(len(LENGTHS)))).sum().backward()
        rows = [parameter.grad_sample.flatten(1) for parameter in trained(model)]
    found = clipped_sum({CPU: rows}, None, clip_norm, flat)[CPU]
    assert (found - total).norm() < 1e-5 * total.norm()


@every_family
def test_the_fused_forward_pass_is_pefts(family: str) -> None:
    model, every = adapted(family), list(range(len(LENGTHS)))
    wanted = losses(model, every)
    with per_record_gradients(model):
        found = losses(model, every)
    assert (found - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@every_family_and_every_matrix
def test_gradient_checkpointing_keeps_records_apart(family: str, trains: str) -> None:
    """Layers then run a second time within the backward pass."""
    model = adapted(family, trains=trains)
    wanted = one_at_a_time(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    # Transformers checkpoints in training mode only; none of these models has dropout left.
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
        if hasattr(module, "gradient_checkpointing"):
            module.train()
    runs = 0

    def count(*_given: object) -> None:
        nonlocal runs
        runs += 1

    layer = next(module for module in model.modules() if plain_lora(module) is not None)
    layer.register_forward_hook(count)
    assert largest_error(together(model), wanted) < 1e-5
    assert runs == 2


@every_family_and_every_matrix
def test_bfloat16_autocast_gives_nearly_the_same_gradients(family: str, trains: str) -> None:
    model = adapted(family, trains=trains)

    def under_autocast(model: nn.Module, indices: list[int]) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            return losses(model, indices)

    found, wanted = together(model, under_autocast), one_at_a_time(model)
    assert largest_error(found, wanted) > 0
    # As near to float32 as PEFT itself comes.
    pefts = one_at_a_time(model, under_autocast)
    assert largest_error(found, wanted) < 1.5 * largest_error(pefts, wanted) + 0.01


class Records(nn.Module):
    """Layers on [n, 4] or [n, t, 4]; `loss` takes one number a record."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def loss(self, inputs: torch.Tensor) -> torch.Tensor:
        return (self.layers(inputs) ** 2).flatten(1).sum(1)

    def check(self, *shape: int) -> None:
        inputs = torch.randn(5, *shape, 4, generator=torch.Generator().manual_seed(0))
        wanted = [torch.autograd.grad(self.loss(x[None]).sum(), trained(self)) for x in inputs]
        with per_record_gradients(self):
            self.loss(inputs).sum().backward()
            for parameter, *rows in zip(trained(self), *wanted, strict=True):
                torch.testing.assert_close(
                    parameter.grad_sample, torch.stack(rows), rtol=1e-5, atol=1e-5
                )


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_trained_linear_layer_has_the_gradient_of_each_record(
    shape: tuple[int, ...], bias: bool
) -> None:
    torch.manual_seed(2)
    Records(nn.Linear(4, 3, bias=bias), nn.Tanh(), nn.Linear(3, 4)).check(*shape)


def test_a_bias_may_be_trained_without_its_weight() -> None:
    torch.manual_seed(2)
    model = Records(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model.layers[0].weight.requires_grad_(False)
    model.check(3)


@pytest.mark.parametrize("shared", [nn.Linear(4, 4), "LoRA"])
def test_a_layer_called_twice_in_a_pass_sums_both_calls(shared: nn.Module | str) -> None:
    torch.manual_seed(2)
    layer = shared if isinstance(shared, nn.Module) else lora_layer()
    Records(layer, nn.Tanh(), layer).check(3)


def lora_layer(out: int = 4, **options: object) -> nn.Module:
    """One PEFT layer, 4 -> out, with a random adapter."""
    model = nn.Sequential(nn.Linear(4, out))
    config = LoraConfig(r=2, target_modules=["0"], **options)
    layer = get_peft_model(model, config).eval().base_model.model[0]
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


@pytest.mark.parametrize("options", [{"lora_dropout": 0.5}, {"lora_bias": True}])
def test_lora_that_is_not_plain_has_the_gradient_of_each_record(options: dict) -> None:
    layer = lora_layer(**options)
    assert plain_lora(layer) is None
    Records(layer, nn.Tanh(), nn.Linear(4, 4)).check(3)


def test_two_adapters_at_once_have_the_gradient_of_each_record() -> None:
    layer = lora_layer()
    layer.update_layer("second", 2, lora_alpha=3, config=LoraConfig(r=2, init_lora_weights=False))
    layer.set_adapter(["default", "second"])
    assert plain_lora(layer) is None
    Records(layer, nn.Tanh(), nn.Linear(4, 4)).check(3)


def test_a_variant_that_sends_weights_through_the_adapter_is_refused() -> None:
    model = Records(lora_layer(use_dora=True))
    with pytest.raises(ModelError, match="variant of LoRA") as caught, per_record_gradients(model):
        pass
    assert caught.value.field == "layers.0"


def test_a_trained_module_without_a_rule_is_refused() -> None:
    model = Records(nn.BatchNorm1d(4))
    refused = pytest.raises(ModelError, match="no gradient for each record")
    with refused as caught, per_record_gradients(model):
        pass
    assert (caught.value.field, caught.value.found) == ("layers.0", "BatchNorm1d")
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_trained_norm_goes_through_opacus_and_says_so() -> None:
    model = Records(nn.Linear(4, 4), nn.LayerNorm(4)).eval()
    nn.init.normal_(model.layers[1].weight)
    with pytest.warns(UserWarning, match=r"layers.1 \(LayerNorm\) is trained through Opacus"):
        model.check(3)
    assert not model.layers[1].training


@pytest.mark.parametrize("layer", ["LoRA", "linear"])
def test_two_passes_are_never_mixed(layer: str) -> None:
    model = Records(lora_layer() if layer == "LoRA" else nn.Linear(4, 4))
    with per_record_gradients(model):
        model.loss(torch.ones(5, 3, 4)).sum().backward()
        with pytest.raises(ModelError, match="not separate"):
            model.loss(torch.ones(5, 3, 4)).sum().backward()


def test_gradients_that_are_taken_make_room_for_the_next_pass() -> None:
    model = Records(lora_layer())
    inputs = torch.randn(5, 3, 4)
    with per_record_gradients(model):
        model.loss(inputs).sum().backward()
        first = [parameter.grad_sample for parameter in trained(model)]
        for parameter in trained(model):
            parameter.grad_sample = None
        model.loss(inputs).sum().backward()
        for parameter, rows in zip(trained(model), first, strict=True):
            assert torch.equal(parameter.grad_sample, rows)


def test_an_input_that_all_records_share_is_refused() -> None:
    """A position table that goes through the same layer has rows that are not records."""
    layer = lora_layer()
    model = Records(layer)
    with per_record_gradients(model):
        total = model.loss(torch.ones(5, 3, 4)).sum() + layer(torch.ones(1, 3, 4)).sum()
        with pytest.raises(ModelError, match="not separate"):
            total.backward()


def test_a_layer_under_a_checkpoint_of_its_own_counts_once() -> None:
    layer = lora_layer()
    inputs = torch.randn(5, 3, 4, requires_grad=True)
    with per_record_gradients(layer):
        (layer(inputs) ** 2).sum().backward()
        wanted = [parameter.grad_sample for parameter in trained(layer)]
        for parameter in trained(layer):
            parameter.grad_sample = None
        (checkpoint(layer, inputs, use_reentrant=False) ** 2).sum().backward()
        for parameter, rows in zip(trained(layer), wanted, strict=True):
            assert torch.equal(parameter.grad_sample, rows)


def test_the_inputs_gradient_is_pefts() -> None:
    layer = lora_layer(out=3)
    inputs = torch.randn(5, 3, 4, requires_grad=True)
    (wanted,) = torch.autograd.grad((layer(inputs) ** 2).sum(), inputs)
    with per_record_gradients(layer):
        (layer(inputs) ** 2).sum().backward()
    torch.testing.assert_close(inputs.grad, wanted, rtol=1e-5, atol=1e-6)


def test_nothing_is_left_on_the_model_afterwards() -> None:
    model = adapted("BERT and MiniLM")
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    with per_record_gradients(model):
        losses(model, [0, 1]).sum().backward()
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert not any(vars(parameter) for parameter in model.parameters())


def test_a_frozen_a_keeps_no_inputs_for_the_backward_pass() -> None:
    """They are most of the memory of a training step."""
    kept: list[tuple[int, ...]] = []
    for trains in ("AB", "B"):
        layer = lora_layer()
        layer.lora_A["default"].weight.requires_grad_("A" in trains)
        sizes: list[tuple[int, ...]] = []
        with (
            per_record_gradients(layer),
            torch.autograd.graph.saved_tensors_hooks(
                lambda tensor, sizes=sizes: sizes.append(tuple(tensor.shape)) or tensor, lambda x: x
            ),
        ):
            layer(torch.randn(5, 3, 4))
        kept.append(tuple(sorted(sizes)))
    assert kept == [((5, 3, 2), (5, 3, 4)), ((5, 3, 2),)]
