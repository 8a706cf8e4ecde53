"""Causal language models through the seam: losses, gradients of records, caches, architectures."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from support.small_models import DECODERS, one_round, plan_for, save_decoder
from transformers import AutoModelForCausalLM

from umbel_client.data.chat import IGNORED
from umbel_client.data.records import load_records
from umbel_client.dpsgd.batch_size import record_bytes
from umbel_client.dpsgd.per_record import per_record_gradients
from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.models.adapters.targets import all_linear
from umbel_client.models.base.int8 import Int8Linear, eight_bits, scale_of
from umbel_client.privacy.calibration import SiteNoise
from umbel_client.tasks.prepared import PreparedData, prepare
from umbel_client.tasks.shapes import BatchLimit
from umbel_client.tasks.task import CausalLmTask
from umbel_client.training.round import LocalTrainer
from umbel_client.training.self_test import self_test
from umbel_common.adapters.peft_folder import tensor_files, text_files
from umbel_common.adapters.vector import initial_vector
from umbel_common.errors import ModelError, PlanError
from umbel_common.plans.check import check_plan
from umbel_common.plans.plan import CausalLm, NoPrivacy, TrainingPlan

TASK = CausalLm(max_tokens=64)
SEAM = CausalLmTask()
PAIRS = [("a", "bc"), ("what is it?", "an ulcer of the stomach"), ("x" * 9, "y"), ("q", "r" * 30)]
LAST_LAYER = {"layers": (2,)}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = ({"prompt": prompt, "completion": answer} for prompt, answer in PAIRS)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def loaded(
    folder: Path, plan: TrainingPlan, file: Path, **how: Any
) -> tuple[AdaptedModel, PreparedData]:
    model = AdaptedModel.load(folder, plan, **how)
    random = np.random.default_rng(0)
    model.set_vector(random.normal(0, 0.1, plan.lora.size).astype(np.float32))
    records = load_records(file, plan.task)
    data = prepare(model, folder, records, BatchLimit(8), cache=None)
    return model, data


def losses(model: AdaptedModel, data: PreparedData) -> torch.Tensor:
    every = np.arange(len(data))
    return SEAM.losses(model, SEAM.batch(data, data.part(every)))


def gradients_together(model: AdaptedModel, data: PreparedData) -> torch.Tensor:
    """float32[records, elements]."""
    parameters = list(model.select(1).values())
    with per_record_gradients(model), torch.enable_grad():
        losses(model, data).sum().backward()
        return torch.cat([p.grad_sample.flatten(1) for p in parameters], dim=1).detach()


def gradients_alone(model: AdaptedModel, data: PreparedData) -> torch.Tensor:
    """By torch and PEFT alone, one record at a time."""
    parameters = list(model.select(1).values())
    rows = []
    for index in range(len(data)):
        batch = SEAM.batch(data, data.part(np.array([index])))
        loss = SEAM.losses(model, batch).sum()
        found = torch.autograd.grad(loss, parameters)
        rows.append(torch.cat([gradient.flatten() for gradient in found]))
    return torch.stack(rows)


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("kind", DECODERS)
def test_a_loss_is_transformers_own_of_the_record_alone(
    tmp_path: Path, file: Path, kind: str
) -> None:
    folder = save_decoder(tmp_path / kind, kind)
    targets = ("c_attn",) if kind == "gpt2" else ("q_proj", "v_proj")
    plan = plan_for(folder, TASK, lora={"target_modules": targets})
    model, data = loaded(folder, plan, file)
    found = losses(model, data)
    for index in range(len(data)):
        batch = SEAM.batch(data, data.part(np.array([index])))
        assert (batch.labels != IGNORED).any()
        wanted = model.base(input_ids=batch.inputs.ids, labels=batch.labels).loss
        assert found[index].item() == pytest.approx(wanted.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("llama", ("q_proj", "v_proj")),
        *((kind, "all") for kind in DECODERS if kind != "gpt2"),
        # Two of the layers that all adapted together.
        *(
            pytest.param(kind, ("q_proj", "v_proj"), marks=pytest.mark.full)
            for kind in DECODERS
            if kind not in ("gpt2", "llama")
        ),
    ],
)
def test_gradients_of_records_are_those_of_each_alone(
    tmp_path: Path, file: Path, kind: str, targets: Any
) -> None:
    folder = save_decoder(tmp_path / kind, kind)
    names = all_linear(folder, TASK) if targets == "all" else targets
    assert targets != "all" or len(names) == 7
    plan = plan_for(folder, TASK, lora={"target_modules": names})
    model, data = loaded(folder, plan, file)
    assert difference(gradients_together(model, data), gradients_alone(model, data)) < 1e-4
    self_test(model, 1.0, BatchLimit(4), entropy=np.random.default_rng(1).bytes)


def test_frozen_layers_of_a_decoder_run_once(llama: Path, file: Path) -> None:
    plan = plan_for(llama, TASK, lora=LAST_LAYER)
    model, data = loaded(llama, plan, file)
    assert data.prefix is not None
    whole = PreparedData(data.tokens, data.labels, prefix=None)
    assert losses(model, data).tolist() == pytest.approx(losses(model, whole).tolist(), rel=1e-3)
    found, wanted = gradients_together(model, data), gradients_together(model, whole)
    assert difference(found, wanted) < 5e-3


def test_layers_with_different_windows_are_not_split(tmp_path: Path, file: Path) -> None:
    folder = save_decoder(tmp_path / "gemma2", "gemma2")
    plan = plan_for(folder, TASK, lora=LAST_LAYER)
    model, data = loaded(folder, plan, file)
    assert (model.depth, model.frozen_output, data.prefix) == (0, "nothing", None)


def test_capped_logits_are_left_to_the_model(tmp_path: Path, file: Path) -> None:
    """Gemma 2 squeezes its logits after the output layer."""
    folder = save_decoder(tmp_path / "gemma2", "gemma2", final_logit_softcapping=0.5)
    model, data = loaded(folder, plan_for(folder, TASK), file)
    batch = SEAM.batch(data, data.part(np.array([1])))
    wanted = model.base(input_ids=batch.inputs.ids, labels=batch.labels).loss
    found = SEAM.losses(model, batch)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-4)


def test_checkpointing_changes_memory_and_nothing_else(llama: Path, file: Path) -> None:
    plan = plan_for(llama, TASK)
    model, data = loaded(llama, plan, file)
    saving, _ = loaded(llama, plan, file, checkpointing=True)
    saving.train()
    assert difference(gradients_together(saving, data), gradients_together(model, data)) < 1e-5
    _, kept, _ = record_bytes(model)
    _, kept_when_saving, _ = record_bytes(saving)
    assert kept_when_saving < kept / 2


def test_checkpointed_layers_drop_nothing_out(tmp_path: Path, file: Path) -> None:
    folder = save_decoder(tmp_path / "gpt2", "gpt2", resid_pdrop=0.5, attn_pdrop=0.5)
    plan = plan_for(folder, TASK, lora={"target_modules": ("c_attn",)})
    model, data = loaded(folder, plan, file, checkpointing=True)
    assert torch.equal(losses(model, data), losses(model, data))


@pytest.mark.parametrize("tied", [False, True])
def test_bfloat16_costs_half_a_per_cent(tmp_path: Path, file: Path, tied: bool) -> None:
    folder = save_decoder(tmp_path / "llama", tie_word_embeddings=tied)
    plan = plan_for(folder, TASK)
    model, data = loaded(folder, plan, file)
    low, _ = loaded(folder, plan, file, precision="bfloat16")
    assert losses(low, data).tolist() == pytest.approx(losses(model, data).tolist(), rel=0.02)
    assert difference(gradients_together(low, data), gradients_together(model, data)) < 0.1
    hidden = low.base.get_input_embeddings()(torch.tensor([1]))
    assert hidden.dtype == torch.float32


def test_a_round_without_privacy_learns_the_answers(llama: Path, file: Path) -> None:
    training = one_round(len(PAIRS), steps=30)
    plan = plan_for(llama, TASK, training=training, privacy=NoPrivacy())
    model, data = loaded(llama, plan, file)
    start = initial_vector(plan)
    model.set_vector(start)
    before = float(losses(model, data).mean())
    entropy = np.random.default_rng(1).bytes
    result = LocalTrainer(model, data, SiteNoise(1.0, None), entropy, BatchLimit(2)).round(1, start)
    model.set_vector(start + result.delta)
    assert float(losses(model, data).mean()) < 0.7 * before


@pytest.mark.parametrize("scaling", ["standard", "rank-stabilised"])
def test_plain_peft_loads_a_release_to_the_same_logits(
    llama: Path, tmp_path: Path, file: Path, scaling: Any
) -> None:
    plan = plan_for(llama, TASK, lora={"scaling": scaling, "rank": 4})
    model, _ = loaded(llama, plan, file)
    ids = torch.tensor([[1, 40, 41, 42, 2]])
    wanted = model.base(input_ids=ids).logits
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name, tensors in tensor_files(plan, model.vector()).items():
        safetensors.numpy.save_file(tensors, folder / name, metadata={"format": "pt"})
    for name, text in text_files(plan).items():
        (folder / name).write_text(text)
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    found = PeftModel.from_pretrained(base, folder).eval()(input_ids=ids).logits
    assert float((found - wanted).abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("target", "found"),
    [
        ("lm_head", "lm_head: the output layer"),
        ("embed_tokens", "model.embed_tokens: Embedding"),
        ("norm", "model.norm: LlamaRMSNorm"),
    ],
)
def test_what_has_no_gradient_of_a_record_is_no_target(
    llama: Path, target: str, found: str
) -> None:
    with pytest.raises(ModelError) as caught:
        plan_for(llama, TASK, lora={"target_modules": (target,)})
    assert caught.value.found == found


def test_a_plan_needs_an_adapter(llama: Path) -> None:
    plan = plan_for(llama, TASK, lora={"target_modules": ()})
    with pytest.raises(PlanError, match="nothing to train"):
        check_plan(plan)


def test_four_bits_leave_gradients_of_records_exact(tmp_path: Path, file: Path) -> None:
    llama = save_decoder(tmp_path / "llama", hidden_size=64, intermediate_size=128, head_dim=32)
    plan = plan_for(llama, TASK)
    model, data = loaded(llama, plan, file, quantisation="nf4")
    assert type(model.base.model.layers[0].mlp.up_proj) is Linear4bit
    found = gradients_together(model, data)
    assert difference(found, gradients_alone(model, data)) < 1e-4
    self_test(model, 1.0, BatchLimit(4), entropy=np.random.default_rng(1).bytes)
    # A plain model of the weights that the four bits stand for.
    plain, _ = loaded(llama, plan, file)
    for name, layer in model.base.named_modules():
        if type(layer) is Linear4bit:
            values = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            other = plain.base.get_submodule(name).weight
            assert 0.02 < difference(values, other) < 0.2
            other.data.copy_(values)
    assert difference(found, gradients_together(plain, data)) < 1e-4


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_eight_bits_leave_gradients_of_records_exact(
    tmp_path: Path, file: Path, precision: str
) -> None:
    llama = save_decoder(tmp_path / "llama", hidden_size=64, intermediate_size=128, head_dim=32)
    plan = plan_for(llama, TASK)
    model, data = loaded(llama, plan, file, quantisation="int8", precision=precision)
    found = gradients_together(model, data)
    tolerance = 1e-4 if precision == "float32" else 0.1
    assert difference(found, gradients_alone(model, data)) < tolerance
    self_test(model, 1.0, BatchLimit(4), entropy=np.random.default_rng(1).bytes)
    # A plain model of the weights that the eight bits stand for.
    plain, _ = loaded(llama, plan, file, precision=precision)
    for name, layer in model.base.named_modules():
        if isinstance(layer, Int8Linear):
            values = layer.weight.data * scale_of(layer.weight)
            other = plain.base.get_submodule(name).weight
            assert 1e-4 < difference(values, other.float()) < 0.02
            other.data.copy_(values)
    assert difference(found, gradients_together(plain, data)) < tolerance


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_eight_bits_show_a_weight_that_is_not_finite(broken: float) -> None:
    values = torch.full((3, 4), 0.02)
    values[1, 2] = broken
    values[2] = 0
    layer = Int8Linear(4, 3, bias=False, device="meta")
    layer.weight = eight_bits(values, torch.device("cpu"))  # type: ignore[assignment]
    first, second, third = layer(torch.ones(1, 4))[0].tolist()
    assert first == pytest.approx(0.08)
    assert math.isnan(second)
    assert third == 0


def test_without_its_package_four_bits_are_refused(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModelError) as caught:
        AdaptedModel.load(llama, plan_for(llama, TASK), quantisation="nf4")
    assert caught.value.field == "model.quantisation"
