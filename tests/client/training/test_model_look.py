"""What is wrong with a model for a plan is told when the plan is made, before anybody signs."""

from pathlib import Path
from typing import Any

import pytest
from support.architectures import WORDS, save_architecture
from support.small_models import plan_for
from transformers import BertTokenizerFast

from umbel_client.models.adapters.targets import all_linear
from umbel_client.models.base import made_up
from umbel_client.models.base.made_up import made_up_base
from umbel_client.models.base.skeleton import skeleton
from umbel_client.training import model_look
from umbel_client.training.model_look import describe, look_at, require_vocabulary
from umbel_common.errors import ModelError
from umbel_common.plans.plan import CausalLm, Classification, NoPrivacy, Task

POOLED = Classification(labels=("a", "b"), max_tokens=16)
LANGUAGE = CausalLm(max_tokens=16, template="plain")


def looked_at(folder: Path, task: Task, *targets: str, **parts: Any) -> model_look.Look:
    names = targets or all_linear(folder, task)
    return look_at(folder, plan_for(folder, task, {"target_modules": names}, **parts))


@pytest.mark.parametrize(("kind", "task"), [("ModernBert", POOLED), ("GPT2", LANGUAGE)])
def test_a_model_that_trains_is_tried_whole(tmp_path: Path, kind: str, task: Task) -> None:
    folder = save_architecture(tmp_path / "m", kind, causal=task == LANGUAGE)
    look = looked_at(folder, task)
    assert (look.layers, look.tokens, look.whole) == (2, 16, True)


def test_a_large_model_is_cut_to_its_kinds_of_layers_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_look, "_WORK", 1e5)
    monkeypatch.setattr(model_look, "_SHORTEST", 5)
    kinds = [*["sliding_attention"] * 3, "full_attention"]
    folder = save_architecture(
        tmp_path / "m", "Gemma2", causal=True, num_hidden_layers=6, layer_types=(kinds * 2)[:6]
    )
    look = looked_at(folder, LANGUAGE)
    assert (look.layers, look.all_layers) == (4, 6)
    assert (look.tokens, look.max_tokens, look.whole) == (5, 16, False)


def test_made_up_weights_share_their_memory_and_are_all_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(made_up, "_LARGEST", 300)
    folder = save_architecture(tmp_path / "m", "Llama")
    base = made_up_base(folder, POOLED)
    wanted = {name: one.shape for name, one in skeleton(folder, POOLED).named_parameters()}
    assert {name: one.shape for name, one in base.named_parameters()} == wanted
    one, other = (base.get_parameter(f"layers.{n}.mlp.up_proj.weight") for n in (0, 1))
    assert one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    assert not one.equal(other)
    # A large one has fewer values than elements.
    table = base.get_parameter("embed_tokens.weight")
    assert table.untyped_storage().nbytes() == 4 * sum(table.shape)


@pytest.mark.parametrize(
    ("kind", "task", "targets", "message", "told"),
    [
        ("DebertaV2", POOLED, ("query_proj", "value_proj"), "not separate", '["value_proj"]'),
        ("OPT", LANGUAGE, ("q_proj", "fc1"), "not separate", '["q_proj"]'),
        ("Mamba", LANGUAGE, ("in_proj", "dt_proj"), "no part in", '["in_proj"]'),
        ("T5", POOLED, ("q", "v"), "encoder-decoder", "t5"),
        ("Bart", POOLED, ("q_proj",), "encoder-decoder", "bart"),
        ("Bert", LANGUAGE, ("query",), "incomplete", "cls"),
    ],
)
def test_what_no_site_could_train_is_refused_with_what_to_do(
    tmp_path: Path, kind: str, task: Task, targets: tuple[str, ...], message: str, told: str
) -> None:
    causal = task == LANGUAGE and kind != "Bert"
    folder = save_architecture(tmp_path / "m", kind, causal=causal)
    with pytest.raises(ModelError, match=message) as caught:
        looked_at(folder, task, *targets)
    assert told in str(caught.value)


@pytest.mark.parametrize("kind", ["Bert", "XLNet"])
def test_a_model_that_sees_what_it_is_to_write_is_refused(tmp_path: Path, kind: str) -> None:
    folder = save_architecture(tmp_path / "m", kind, causal=True)
    with pytest.raises(ModelError, match="reads ahead") as caught:
        looked_at(folder, LANGUAGE)
    assert kind.lower() in str(caught.value.found)
    decoder = save_architecture(tmp_path / "d", "Bert", causal=True, is_decoder=True)
    assert looked_at(decoder, LANGUAGE, "query").whole


def test_without_privacy_gradients_need_not_be_separate(tmp_path: Path) -> None:
    folder = save_architecture(tmp_path / "m", "DebertaV2")
    assert looked_at(folder, POOLED, "query_proj", privacy=NoPrivacy()).whole


def test_a_plan_that_the_model_cannot_read_is_refused(tmp_path: Path) -> None:
    for kind, positions in (("Roberta", 64), ("OPT", 66)):
        folder = save_architecture(tmp_path / kind, kind)
        targets = ("query",) if kind == "Roberta" else ("q_proj",)
        fits, long = (
            Classification(labels=("a", "b"), max_tokens=tokens)
            for tokens in (positions, positions + 1)
        )
        assert looked_at(folder, fits, *targets).tokens == positions
        with pytest.raises(ModelError, match="longer texts"):
            looked_at(folder, long, *targets)


def tokens_added(folder: Path, tokens: list[str], *, special: bool) -> Path:
    tokenizer = BertTokenizerFast.from_pretrained(folder)
    tokenizer.add_tokens(tokens, special_tokens=special)
    tokenizer.save_pretrained(folder)
    return folder


def test_tokens_of_texts_beyond_the_embedding_are_refused_and_others_are_not(
    tmp_path: Path,
) -> None:
    folder = tokens_added(save_architecture(tmp_path / "m", "Bert"), ["<image>"], special=True)
    assert looked_at(folder, POOLED).whole
    assert f"{len(WORDS) + 5} tokens known" in describe(folder)
    tokenizer = BertTokenizerFast.from_pretrained(folder)
    tokenizer.pad_token = "<image>"  # every batch would have it
    with pytest.raises(ModelError, match="more tokens than the model knows"):
        require_vocabulary(folder, tokenizer, len(WORDS) + 5)
    tokens_added(folder, ["aorta", "vena"], special=False)
    for look in (lambda: looked_at(folder, POOLED), lambda: describe(folder)):
        with pytest.raises(ModelError, match="more tokens than the model knows") as caught:
            look()
        assert "2 tokens beyond the embedding, such as 'vena'" in str(caught.value.found)


def test_a_template_that_opens_thoughts_in_the_prompt_alone_is_refused(tmp_path: Path) -> None:
    """As that of DeepSeek-R1: every conversation would be refused, at each site."""
    folder = save_architecture(tmp_path / "m", "Llama", causal=True)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant><think>{% endif %}"
    )
    with pytest.raises(ModelError, match="of no use to train on answers") as caught:
        looked_at(folder, CausalLm(max_tokens=16), "q_proj")
    assert caught.value.field == "chat_template"


def test_weights_that_lack_a_tensor_are_refused(tmp_path: Path) -> None:
    folder = save_architecture(tmp_path / "m", "DistilBert")
    stock = Classification(labels=("a", "b"), max_tokens=16, head="stock")
    with pytest.raises(ModelError, match="pre_classifier"):
        looked_at(folder, stock, "q_lin")
