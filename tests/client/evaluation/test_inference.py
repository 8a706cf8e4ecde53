"""Answers end where their template ends them, or where the model's context ends."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.chat_templates import PLAIN, SHAPES, Shape, save_shape
from support.small_models import CHATML, plan_for, save_decoder
from transformers import LlamaConfig, LlamaForCausalLM

from umbel_client.data.chat import Chat, tokenise_answers
from umbel_client.data.conversations import Conversation, Turn
from umbel_client.data.records import LmRecords, load_records
from umbel_client.evaluation.answers import generate_answers, score_answers
from umbel_client.evaluation.inference import Sampling, answer_prompts
from umbel_client.models.adapted_model import AdaptedModel
from umbel_common.adapters.vector import initial_vector
from umbel_common.errors import DataError
from umbel_common.plans.plan import CausalLm


@pytest.mark.parametrize(
    ("kind", "size", "layers"),
    # With a position for each token, and with positions that are rotations.
    [("gpt2", "n_positions", "c_attn"), ("llama", "max_position_embeddings", "q_proj")],
)
def test_an_answer_ends_at_the_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, size: str, layers: str
) -> None:
    folder = save_decoder(tmp_path / kind, kind, chat_template=None, **{size: 24})
    task = CausalLm(max_tokens=16, template="plain")
    plan = plan_for(folder, task, lora={"target_modules": (layers,)})
    model = AdaptedModel.load(folder, plan)
    model.set_vector(initial_vector(plan))
    chat = Chat.load(folder, task)
    prompts = [[Turn("user", "a" * length)] for length in (20, 2, 23)]
    long = Sampling(max_new_tokens=100)
    room: list[int] = []
    generate: Any = model.base.generate

    def noted(**options: Any) -> Any:
        room.append(options["max_new_tokens"])
        return generate(**options)

    monkeypatch.setattr(model.base, "generate", noted)
    together = list(answer_prompts(model, chat, prompts, long))
    assert together == [
        answer for p in prompts for answer in answer_prompts(model, chat, [p], long)
    ]
    assert room == [4, 22, 1] * 2
    with pytest.raises(DataError, match="prompt 2 leaves no room"):
        list(answer_prompts(model, chat, [prompts[0], [Turn("user", "a" * 24)]], long))


def taught(folder: Path, shape: Shape, task: CausalLm, rows: dict[str, str]) -> AdaptedModel:
    """A model that has learned answers by heart, with the labels that training counts."""
    save_shape(folder, shape)
    torch.set_num_threads(1)
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.2}
    config = LlamaConfig.from_pretrained(folder, **sizes, **heads, max_position_embeddings=128)
    settings = folder / "generation_config.json"
    kept = settings.read_bytes() if settings.exists() else None
    pairs = [
        Conversation((Turn("user", asked), Turn("assistant", said))) for asked, said in rows.items()
    ]
    records = LmRecords(source=bytes(32), records=tuple(pairs))
    tokens, labels = tokenise_answers(records, folder, task)
    model = LlamaForCausalLM(config)
    every = np.arange(len(pairs))
    places, mask = tokens.rows(every, int(tokens.lengths.max()))
    ids = torch.from_numpy(tokens.ids[places].astype(np.int64))
    wanted = torch.from_numpy(np.where(mask == 1, labels[places], -100))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        model(input_ids=ids, attention_mask=torch.from_numpy(mask), labels=wanted).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    if kept is None:
        settings.unlink()
    else:
        settings.write_bytes(kept)
    plan = plan_for(folder, task)
    adapted = AdaptedModel.load(folder, plan)
    adapted.set_vector(initial_vector(plan))
    return adapted


LEARNED = {"A?": "red", "B?": "bad", "C and more?": "gold"}


@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("gemma", "chat"),
        ("words", "chat"),
        pytest.param("qwen3", "chat", marks=pytest.mark.full),
        pytest.param("mistral", "chat", marks=pytest.mark.full),
        pytest.param("ends a text", "plain", marks=pytest.mark.full),
    ],
)
def test_what_training_counts_is_what_a_model_answers(
    tmp_path: Path, name: str, template: Any
) -> None:
    task = CausalLm(template=template, max_tokens=64)
    model = taught(tmp_path, {**SHAPES, **PLAIN}[name], task, LEARNED)
    chat = Chat.load(tmp_path, task)
    questions = [(Turn("user", asked),) for asked in LEARNED]
    said = answer_prompts(model, chat, questions, Sampling(max_new_tokens=32))
    assert list(said) == list(LEARNED.values())
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"prompt": asked, "completion": f" {said}\n" * (template == "chat") or said})
            + "\n"
            for asked, said in LEARNED.items()
        )
    )
    records = load_records(rows, task).records
    scores = score_answers(generate_answers(model, tmp_path, records, 3, 32))
    assert scores is not None
    assert (scores.exact_match, scores.rouge_l) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("half an emoji \ud83d", "prompt 2 cannot be read by the model's tokenizer"),
        ("secret", "prompt 2 cannot be rendered by the chat template"),
    ],
)
def test_a_prompt_that_cannot_be_asked_is_named(tmp_path: Path, asked: str, message: str) -> None:
    strict = (
        "{% if messages[0]['content'] == 'secret' %}{{ raise_exception('not that') }}{% endif %}"
    )
    folder = save_decoder(tmp_path, chat_template=strict + CHATML)
    model = AdaptedModel.load(folder, plan_for(folder, CausalLm()))
    chat = Chat.load(folder, CausalLm())
    with pytest.raises(DataError, match=message) as caught:
        list(answer_prompts(model, chat, [[Turn("user", "a")], [Turn("user", asked)]], Sampling()))
    assert caught.value.field == "prompt 2"
    assert asked not in str(caught.value)
