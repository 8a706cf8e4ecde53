"""What an answer is, for tokenizers and chat templates of the usual shapes."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.chat_templates import (
    CHANNELS,
    GEMMA,
    HEADERLESS,
    PLAIN,
    QUOTED,
    SHAPES,
    THINKING,
    Shape,
    save_shape,
)
from support.small_models import CHATML

from umbel_client.curation.examples import read_examples
from umbel_client.curation.lengths import count_tokens
from umbel_client.data.chat import IGNORED, Chat, tokenise_answers
from umbel_client.data.conversations import Conversation, Passage, Turn
from umbel_client.data.records import LmRecords, load_records
from umbel_client.data.template import ChatTemplate
from umbel_client.site.config import DataConfig
from umbel_common.errors import DataError, ModelError
from umbel_common.plans.plan import CausalLm
from umbel_host.files.model_folder import ends_of_config, ends_of_generation, read_texts

QUESTION = Turn("user", "What is it?")
ANSWERS = ("An ulcer.", "bad", "\nAn ulcer.", " Ulcère, 5 mm. ", "one\n\ntwo\n")
WRITTEN = {THINKING: "</think>\n\n", CHANNELS: "<|channel|>final<|message|>", QUOTED: '"'}
"""What a model has to write before its answer."""
CHATTED = [pytest.param(shape, "chat", id=name) for name, shape in SHAPES.items()]
WITHOUT = [pytest.param(shape, "plain", id=name) for name, shape in PLAIN.items()]


def said(answer: str, *earlier: Turn) -> Conversation:
    return Conversation((*earlier, QUESTION, Turn("assistant", answer)))


def of(*records: Any) -> LmRecords:
    return LmRecords(source=bytes(32), records=records)


@pytest.mark.parametrize(("shape", "template"), [*CHATTED, *WITHOUT])
def test_an_answer_is_one_thing_for_training_scoring_and_generating(
    tmp_path: Path, shape: Shape, template: Any
) -> None:
    task = CausalLm(template=template)
    chat = Chat.load(save_shape(tmp_path, shape), task)
    records = [said(answer) for answer in ANSWERS]
    if template == "chat":
        records += [said("bad", QUESTION, Turn("assistant", "An ulcer."))]
    tokens, labels = tokenise_answers(of(*records), tmp_path, task)
    for record, start, end in zip(records, tokens.starts[:-1], tokens.starts[1:], strict=True):
        ids, counts = tokens.ids[start:end].tolist(), labels[start:end] != IGNORED
        # What a model is given is what the record begins with.
        frame = chat.frame(record.turns[:-1])
        prompt = chat.prompt_ids(frame.prompt)
        assert ids[: len(prompt)] == prompt
        assert not counts[: len(prompt)].any()
        # The answer and its end count, and nothing else.
        counted = [token for token, one in zip(ids, counts, strict=True) if one]
        text = chat.text(counted).rstrip("\n")
        assert text.endswith(shape.end)
        wanted = record.turns[-1].content.strip()
        own = text.removesuffix(shape.end).strip()
        assert own.removeprefix(WRITTEN.get(str(shape.template), "")).strip() == wanted
        # A model that writes this has given the record's answer, and ends.
        ends = [place for place, token in enumerate(counted) if token in chat.ends(frame)]
        end = chat.end_text(frame)
        if end is None:
            assert ends == [len(counted) - 1]
        else:
            assert ends == []
            assert end in text
        assert chat.answer(frame, counted[: ends[0] if ends else None]) == wanted
        assert chat.reference(record) == wanted


@pytest.mark.parametrize(
    ("shape", "template", "end"),
    [
        pytest.param(PLAIN["ends a text"], "plain", "</s>", id="plain"),
        pytest.param(SHAPES["gemma"], "chat", "<end_of_turn>\n", id="gemma"),
        pytest.param(SHAPES["llama3"], "chat", "<|end_of_text|>", id="another end of the model"),
    ],
)
def test_an_answer_ends_once(tmp_path: Path, shape: Shape, template: Any, end: str) -> None:
    """Some data sets have the end in their texts."""
    task = CausalLm(template=template)
    chat = Chat.load(save_shape(tmp_path, shape), task)
    _, labels = tokenise_answers(of(said(f" red{end}")), tmp_path, task)
    assert chat.text(labels[labels != IGNORED].tolist()).strip() == f"red{end.strip()}"
    assert chat.reference(said(f" red{end}")) == "red"
    with pytest.raises(DataError, match="row 1 has text behind the end of its answer") as caught:
        tokenise_answers(of(said(f"red{end}blue")), tmp_path, task)
    assert end.strip() in str(caught.value.found)
    assert "blue" not in caught.value.diagnostics()


@pytest.mark.parametrize("name", SHAPES)
def test_a_rendered_text_is_the_tokens_of_its_conversation(tmp_path: Path, name: str) -> None:
    task = CausalLm()
    chat = Chat.load(save_shape(tmp_path, SHAPES[name]), task)
    record = said("An ulcer.")
    text = ChatTemplate(chat.tokenizer, tmp_path).written(record.turns)
    expected, labels = tokenise_answers(of(record), tmp_path, task)
    # The end may share its last token with the line feed behind it.
    for rendered in (text, text if name.startswith("words") else text.rstrip("\n")):
        found, counted = tokenise_answers(of(Passage(rendered)), tmp_path, task)
        length = len(found.ids)
        assert expected.ids[:length].tolist() == found.ids.tolist()
        assert labels[:length].tolist() == counted.tolist()
        assert (labels[length:] == IGNORED).all()
    frame = chat.frame(Passage(text))
    assert chat.prompt_ids(frame.prompt) == chat.prompt_ids(chat.frame([QUESTION]).prompt)


@pytest.mark.parametrize("name", ["qwen3", "thinking", "always thinking"])
def test_thoughts_of_a_template_are_neither_taught_nor_compared(tmp_path: Path, name: str) -> None:
    task = CausalLm()
    chat = Chat.load(save_shape(tmp_path, SHAPES[name]), task)
    frame = chat.frame([QUESTION])
    asked = ChatTemplate(chat.tokenizer, tmp_path).written([QUESTION], asked=True)
    assert frame.prompt == asked  # as any other program asks
    tokens, labels = tokenise_answers(of(said("red")), tmp_path, task)
    text = chat.text(tokens.ids.tolist())
    # Left out, unless the prompt has opened them: then a model has to close them.
    assert text.count("<think>") == text.count("</think>") == (name == "thinking")
    assert chat.text(labels[labels != IGNORED].tolist()).count("</think>") == (name == "thinking")
    block = {"thinking": "\n</think>\n\n", "qwen3": "<think>\n\n</think>\n\n"}.get(
        name, "[THINK][/THINK]"
    )
    for written in ("red", f"{block}red"):
        assert chat.answer(frame, chat.prompt_ids(written)) == "red"
    # Thoughts that a record has of its own are part of its answer.
    if name == "always thinking":
        assert "THINK" not in text
        return
    own = said("<think>\nwhy\n</think>\n\nred")
    assert chat.reference(own).removeprefix("<think>\n") == "why\n</think>\n\nred"
    assert chat.frame(own.turns[:-1]) == frame


def test_a_token_that_spans_prompt_and_answer_is_taken_apart(tmp_path: Path) -> None:
    """Two line feeds are one token, and a prompt ends with the first of them."""
    folder = save_shape(tmp_path, SHAPES["chatml"])
    chat = Chat.load(folder, CausalLm())
    tokens, _ = tokenise_answers(of(said("\nred"), said("red")), folder, CausalLm())
    both, one = (
        tokens.ids[start:end] for start, end in zip(tokens.starts, tokens.starts[1:], strict=False)
    )
    assert len(both) == len(one) + 1
    whole = chat.tokenizer(chat.text(both.tolist()), add_special_tokens=False)["input_ids"]
    assert len(whole) == len(one)


def test_every_end_of_a_model_ends_its_answers(tmp_path: Path) -> None:
    folder = save_shape(tmp_path, SHAPES["gemma"])
    chat = Chat.load(folder, CausalLm(template="plain"))
    frame = chat.frame([QUESTION])
    eos, turn, letter = 2, 4, 50
    assert chat.ends(frame) == {eos}
    for name, fields in (
        ("config.json", {"eos_token_id": [eos, turn]}),
        ("config.json", {"text_config": {"eos_token_id": [turn]}}),
        ("generation_config.json", {"eos_token_id": [turn, letter, None, "x", True]}),
        ("generation_config.json", {"eos_token_id": turn}),
    ):
        file = folder / name
        before = file.read_text() if file.exists() else "{}"
        file.write_text(json.dumps(json.loads(before) | fields))
        assert Chat.load(folder, CausalLm(template="plain")).ends(frame) == {eos, turn}
        file.write_text(before)
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(ModelError, match="not JSON"):
        ends_of_generation(folder)
    assert ends_of_config(folder, read_texts(folder)) == [eos]


def test_what_the_settings_of_generation_say_changes_no_record(tmp_path: Path) -> None:
    """They are not in the model's digest."""
    shape = PLAIN["an end in config.json alone"]
    folder, task = save_shape(tmp_path, shape), CausalLm(template="plain")
    before, labels = tokenise_answers(of(said("red")), folder, task)
    (folder / "generation_config.json").write_text('{"eos_token_id": 1}')
    after, again = tokenise_answers(of(said("red")), folder, task)
    assert (before.digest(), labels.tolist()) == (after.digest(), again.tolist())


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_an_answer_that_nothing_ends_is_refused(tmp_path: Path, template: Any) -> None:
    line = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    folder = save_shape(tmp_path, Shape(line, (), None))
    task = CausalLm(template=template)
    with pytest.raises(ModelError, match="no token that ends a text") as caught:
        tokenise_answers(of(said("red")), folder, task)
    assert caught.value.field == "eos_token"


WANTS_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ raise_exception('system first') }}{% endif %}"
)
FAILING = {
    "an error of Python": ("{{ messages[0]['content'] + 1 }}", "TypeError"),
    "a division": ("{{ 1 / (messages | length - messages | length) }}", "ZeroDivisionError"),
    "a name that is not there": ("{{ nothing.of.it }}", "undefined"),
    "bad syntax": ("{% for m in messages %}", "Unexpected end"),
    "an error without a text": ("{{ raise_exception('') }}", "TemplateError"),
    "a clock with a bad format": ("{{ strftime_now(5) }}", "TypeError"),
    "nothing": ("{# #}", "an empty text"),
    "no answer": (
        CHATML.replace(
            "{{ message['content'] }}", "{{ message['content'] if message['role'] == 'user' }}"
        ),
        "without an answer",
    ),
    "no question": (
        "{{ messages[-1]['content'] if messages[-1]['role'] == 'assistant' }}",
        "without a question",
    ),
    "no prompt alone": (
        "{% if messages[-1]['role'] != 'assistant' %}{{ raise_exception('answer last') }}"
        "{% endif %}" + CHATML,
        "answer last",
    ),
}


@pytest.mark.parametrize("name", FAILING)
def test_a_template_that_fails_is_told_as_what_it_is(tmp_path: Path, name: str) -> None:
    template, found = FAILING[name]
    folder = save_shape(tmp_path / "model", Shape(template, ("</s>",), "</s>"))
    file = tmp_path / "a.jsonl"
    rows = [{"prompt": "secret", "completion": "red"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def stats() -> None:
        examples = read_examples(file, DataConfig(path=str(file), public_size=1), None)
        count_tokens(examples, folder)

    for use in (
        stats,
        lambda: tokenise_answers(load_records(file, CausalLm()), folder, CausalLm()),
    ):
        with pytest.raises(
            ModelError, match="chat template of a base model cannot be used"
        ) as told:
            use()
        assert (told.value.file, told.value.field) == (folder, "chat_template")
        assert found in str(told.value.found)
        assert "secret" not in told.value.diagnostics()


def test_a_template_may_want_a_system_turn_first(tmp_path: Path) -> None:
    """Also where the header of an answer is looked for in rendered texts."""
    folder = save_shape(tmp_path, Shape(WANTS_SYSTEM + CHATML, ("<|im_start|>", "</s>"), "</s>"))
    record = said("red", Turn("system", "Be brief."))
    chat = Chat.load(folder, CausalLm())
    text = ChatTemplate(chat.tokenizer, folder).written(record.turns)
    for one in (record, Passage(text)):
        _, labels = tokenise_answers(of(one), folder, CausalLm())
        assert chat.text(labels[labels != IGNORED].tolist()) == "red<|im_end|>"
    with pytest.raises(DataError, match="row 1 cannot be rendered by the chat template") as caught:
        tokenise_answers(of(said("red")), folder, CausalLm())
    assert "system first" in str(caught.value.found)
    assert str(folder) in str(caught.value.remedy)


@pytest.mark.parametrize("template", [GEMMA, HEADERLESS])
def test_passages_need_no_template_where_all_of_them_counts(tmp_path: Path, template: str) -> None:
    folder = save_shape(tmp_path, Shape("{{ 1 / 0 }}" + template, ("</s>",), "</s>"))
    task = CausalLm(loss_on="all")
    tokens, labels = tokenise_answers(of(Passage("a passage")), folder, task)
    assert labels.tolist() == tokens.ids.tolist()
