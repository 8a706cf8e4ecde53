"""`umbel-simulate init`: what it writes of files at hand can be run."""

import json
from pathlib import Path

import msgspec
import pytest
from support.small_models import save_bert, save_decoder
from transformers import AutoTokenizer
from typer.testing import CliRunner

from umbel_client.planning.draft import Draft
from umbel_common.errors import ConfigError, DataError, UmbelError
from umbel_common.plans.plan import CausalLm, Classification, FederatedEvaluation
from umbel_common.toml_values import parse_toml
from umbel_simulations.backends.draft import draft_toml
from umbel_simulations.cli.command import app
from umbel_simulations.inputs.new_scenario import Wish, scenario_text
from umbel_simulations.inputs.sources import load_source
from umbel_simulations.scenario.file import find_scenario, parse_scenario
from umbel_simulations.scenario.plan import make_plan, plan_task
from umbel_simulations.scenario.scenario import Scenario


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = [f"w{n}" for n in range(90)]
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    return save_bert(tmp_path_factory.mktemp("bert"), words, max_position_embeddings=64, **sizes)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("llama"))


def lines(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def init(*arguments: object) -> Scenario:
    """The scenario that the command writes; it wrote none before it had made its plan."""
    done = CliRunner().invoke(app, ["init", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return find_scenario(str(arguments[arguments.index("--out") + 1]))


def test_texts_with_labels_of_patients_become_a_scenario(tmp_path: Path, bert: Path) -> None:
    """Of a file with its own names of columns, and a label beyond 16 bits."""
    rows = [f"w{n % 90},{'ab'[n % 2]}\U0001f912,p{n // 2}" for n in range(120)]
    (tmp_path / "Fragen März.csv").write_text("\n".join(["note,organ,who", *rows]) + "\n")
    (tmp_path / "test.csv").write_text("\n".join(["note,organ,who", *rows[:9]]) + "\n")
    columns = ("--text-column", "note", "--label-column", "organ", "--unit", "who")
    found = init(
        *(tmp_path / "Fragen März.csv", "--test", tmp_path / "test.csv", "--model", bert),
        *("--out", tmp_path / "mine.toml", *columns),
    )
    corpus = load_source(found)
    assert corpus.labels == ("a\U0001f912", "b\U0001f912")
    assert (len(corpus.train), len(corpus.test)) == (120, 9)
    assert {example.unit for example in corpus.train} == {f"p{n}" for n in range(60)}
    text = (tmp_path / "mine.toml").read_text()
    assert "120 records, 60 units, of 3 tokens" in text
    # JSON and TOML escape this character in different ways.
    labels = (*corpus.labels, "c\x7f")
    draft = parse_toml(draft_toml(found, labels, bert), Draft, "draft")
    assert draft.task == plan_task(found, labels)
    assert isinstance(draft.task, Classification)


def test_questions_of_three_sites_become_a_scenario(tmp_path: Path, llama: Path) -> None:
    """Each has a file of its own, of another format; and a draft says the same as the plan."""
    turns = [{"role": "user", "content": "d"}, {"role": "assistant", "content": "b"}]
    formats: list[dict[str, object]] = [
        {"prompt": "a", "completion": "b"},
        {"messages": turns},
        {"instruction": "a", "output": "b", "input": "c"},
    ]
    files = [
        lines(tmp_path / f"Site {n}.jsonl", [{**row, "number": k} for k in range(20)])
        for n, row in enumerate(formats)
    ]
    longest = {"prompt": "a" * 60, "completion": "b"}
    test = lines(tmp_path / "test.jsonl", [formats[0]] * 5 + [longest])
    out = tmp_path / "mine.toml"
    found = init(*files, "--test", test, "--model", llama, "--out", out)
    assert found.sites.all_names == ("site-0", "site-1", "site-2")
    assert isinstance(found.task, CausalLm)
    # Test records that are longer than all others are scored all the same.
    turns = [{"role": "user", "content": "a" * 60}, {"role": "assistant", "content": "b"}]
    ids = AutoTokenizer.from_pretrained(llama).apply_chat_template(turns)["input_ids"]
    assert found.task.max_tokens >= len(ids)
    more = "\n[evaluation]\nnoise_multiplier = 2.0\nmax_records = 5\n"
    more += "\n[release_gate]\nmax_loss_increase = 0.5\n"
    scenario = parse_scenario(out.read_text() + more, out)
    assert scenario.release_gate is not None
    draft = parse_toml(draft_toml(scenario, (), llama, "public.jsonl"), Draft, "draft")
    plan = make_plan(scenario, (), llama, largest_site=20, holdout=b"")
    assert (draft.task, draft.training, draft.privacy) == (plan.task, plan.training, plan.privacy)
    assert plan.evaluation is not None
    assert draft.evaluation == FederatedEvaluation(**msgspec.structs.asdict(plan.evaluation))
    assert draft.release_gate is not None
    assert plan.release_gate is not None
    done = CliRunner().invoke(app, ["init", str(test), "--test", str(test), "--out", str(out)])
    assert isinstance(done.exception, UmbelError)
    assert done.exception.message.startswith("a file or folder is in the way")
    nowhere = tmp_path / "nowhere" / "mine.toml"
    done = CliRunner().invoke(app, ["init", str(test), "--test", str(test), "--out", str(nowhere)])
    assert isinstance(done.exception, UmbelError)
    assert done.exception.message == "the folder of a new file does not exist"


def test_what_does_not_become_a_scenario_is_named(tmp_path: Path, bert: Path) -> None:
    pairs = lines(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}] * 9)
    texts = lines(tmp_path / "b.jsonl", [{"text": "a", "label": label} for label in "xyz"])
    (tmp_path / "bad.csv").write_text("text,label\na,x\nb,c,y\n")

    def refused(*train: Path, **more: object) -> UmbelError:
        with pytest.raises(UmbelError) as caught:
            scenario_text(Wish(train=train, test=texts, out=tmp_path / "mine.toml", **more))  # type: ignore[arg-type]
        return caught.value

    same = lines(tmp_path / "c.jsonl", [{"text": "a", "label": "x"}] * 3)
    assert refused(same, same).message.startswith("the training records have one label only")
    assert refused(pairs).field == "--model"
    assert refused(pairs, texts, model=bert).message.endswith("several tasks")
    assert isinstance(refused(texts, texts, sites=3), ConfigError)
    assert isinstance(refused(tmp_path / "bad.csv"), DataError)
    assert refused(tmp_path / "bad.csv").field == "row 2"


@pytest.mark.parametrize(
    "option",
    [("--seed", str(2**53)), ("--rounds", "10001"), ("--sites", "101"), ("--name", "../x")]
    + [("--name", name) for name in ("", " ", "..")],
)
def test_an_option_of_a_run_is_held_to_what_a_scenario_is(
    tmp_path: Path, option: tuple[str, str]
) -> None:
    result = CliRunner().invoke(app, ["run", "smoke", "--runs", str(tmp_path / "runs"), *option])
    assert result.exit_code == 2
    assert not list(tmp_path.iterdir())
