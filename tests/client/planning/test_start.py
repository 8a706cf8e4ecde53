"""A draft's `[start]`: what a plan starts from, and the file beside the plan."""

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from client.planning.test_draft import DRAFT

from umbel_client import drafting
from umbel_client.data.records import load_records
from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.planning.draft import make_plan, read_plan
from umbel_client.planning.draft_file import read_draft
from umbel_client.planning.start import started
from umbel_client.tasks.label_names import computed_start, label_rows
from umbel_client.tasks.prepared import prepare
from umbel_client.tasks.shapes import BatchLimit
from umbel_common.adapters.start import LABEL_ROWS, norm_of
from umbel_common.adapters.vector import initial_vector, unflatten
from umbel_common.errors import ConfigError, DataError, ModelError, PlanError, StorageError
from umbel_common.plans.plan import second_version
from umbel_common.plans.plan_file import plan_from_json, plan_to_json
from umbel_common.plans.requests import EarlierAdapter
from umbel_common.plans.start import LabelNamesStart, ReleasedStart, SeedStart
from umbel_host.files.start_file import read_start, start_file

NAMES = '["w1 w2 w3", "w20 w21"]'


def write_draft(folder: Path, model: Path, start: str, old: str = "", new: str = "") -> Path:
    path = folder / "draft.toml"
    text = DRAFT.format(model=model)
    assert old in text
    path.write_text(f"{text.replace(old, new)}\n[start]\n{start}\n")
    return path


def test_a_head_starts_at_its_labels_names_and_its_file_holds_the_rows(
    tmp_path: Path, tiny_model: Path
) -> None:
    draft = write_draft(tmp_path, tiny_model, f'start = "label-names"\nnames = {NAMES}\nscale = 2')
    out = tmp_path / "start"
    plan, _ = plan_from_json(drafting.made(draft, start=out), draft)
    assert plan == read_plan(draft)
    assert isinstance(plan.start, LabelNamesStart)
    assert plan.start.names == ("w1 w2 w3", "w20 w21")
    vector = read_start(out, plan)
    rows = unflatten(vector, plan.lora.tensors)[LABEL_ROWS]
    assert np.linalg.norm(rows, axis=1) == pytest.approx([2, 2])
    assert abs(float(rows[0] @ rows[1])) < 3.9
    place = start_file(tmp_path / "plan.json", plan)
    assert place is not None
    assert place.parent == tmp_path
    with pytest.raises(StorageError, match="not at hand"):
        read_start(place, plan)
    # Another start, whole and well-formed, is not this plan's.
    other = msgspec.structs.replace(plan.start, tensor=bytes(32))
    with pytest.raises(StorageError, match="not at hand"):
        read_start(out, second_version(plan, start=other))


def test_without_names_the_labels_themselves_are_embedded(tmp_path: Path, tiny_model: Path) -> None:
    labels = ('labels = ["a", "b"]', 'labels = ["w1", "w2"]')
    plan = read_plan(write_draft(tmp_path, tiny_model, 'start = "label-names"', *labels))
    assert isinstance(plan.start, LabelNamesStart)
    assert plan.start.names == ("w1", "w2")


def test_a_table_may_name_the_labels(tmp_path: Path, tiny_model: Path) -> None:
    names = tmp_path / "names.csv"
    names.write_text("label,text\nb,w20\nunused,w3\na,w1 w2\n")
    draft = write_draft(tmp_path, tiny_model, 'start = "label-names"\nnames = "names.csv"')
    plan = read_plan(draft)
    assert isinstance(plan.start, LabelNamesStart)
    assert plan.start.names == ("w1 w2", "w20")
    for text, what in (("label,text\na,w1\n", "none for b"), ("label,text\na,w1\na,w2\n", None)):
        names.write_text(text)
        with pytest.raises(DataError) as caught:
            read_plan(draft)
        assert caught.value.file == names
        assert what is None or what in str(caught.value.found)


def test_a_name_takes_the_path_of_a_record(tmp_path: Path, tiny_model: Path) -> None:
    """A head alone reads the pooled vector, which is what is cached of a record."""
    draft = write_draft(
        tmp_path,
        tiny_model,
        f'start = "label-names"\nnames = {NAMES}',
        'target_modules = ["query"]',
        "target_modules = []",
    )
    plan = read_plan(draft)
    assert isinstance(plan.start, LabelNamesStart)
    model = AdaptedModel.load(tiny_model, plan)
    data = tmp_path / "data.jsonl"
    rows = [{"text": name, "label": "a"} for name in plan.start.names]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = load_records(data, plan.task)
    prefix = prepare(model, tiny_model, records, BatchLimit(4), cache=None).prefix
    assert prefix is not None
    found = label_rows(model, tiny_model, plan, plan.start.names, scale=1.0)
    np.testing.assert_allclose(found, prefix.values.astype(np.float32), atol=1e-3)


def test_a_plan_that_starts_from_its_seed_computes_what_every_party_does(
    tmp_path: Path, tiny_model: Path
) -> None:
    plan = read_plan(write_draft(tmp_path, tiny_model, 'start = "seed"'))
    assert plan.start == SeedStart()
    model = AdaptedModel.load(tiny_model, plan)
    np.testing.assert_array_equal(computed_start(model, tiny_model, plan), initial_vector(plan))


def test_a_start_that_cannot_be_is_refused_before_the_model_is_loaded(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = ('labels = ["a", "b"]', 'labels = ["a", "b"]\nhead = "stock"')
    with pytest.raises(PlanError, match="stock head"):
        read_plan(write_draft(tmp_path, tiny_model, 'start = "label-names"', *stock))
    with pytest.raises(PlanError, match="one for each label"):
        read_plan(write_draft(tmp_path, tiny_model, 'start = "label-names"\nnames = ["w1"]'))
    with pytest.raises(ConfigError):
        read_plan(write_draft(tmp_path, tiny_model, 'start = "planted"'))
    monkeypatch.setattr(drafting, "_can_load", lambda: False)
    with pytest.raises(ModelError, match="loaded"):
        drafting.made(write_draft(tmp_path, tiny_model, 'start = "label-names"'))


def earlier_of(tmp_path: Path, model: Path, old: str = "", new: str = "") -> EarlierAdapter:
    folder = tmp_path / "earlier"
    folder.mkdir(exist_ok=True)
    plan = read_plan(write_draft(folder, model, 'start = "seed"', old, new))
    return EarlierAdapter(
        plan=plan_to_json(plan), adapter="ab" * 32, round=6, norm=norm_of(initial_vector(plan))
    )


@pytest.mark.parametrize("loads", [True, False], ids=["with the model", "from its files"])
def test_a_plan_starts_from_an_earlier_adapter(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, loads: bool
) -> None:
    monkeypatch.setattr(drafting, "_can_load", lambda: loads)
    earlier = earlier_of(tmp_path, tiny_model)
    draft = write_draft(tmp_path, tiny_model, 'start = "released"\njob = "triage-0"')
    file = tmp_path / "earlier.json"
    file.write_text(json.dumps(msgspec.to_builtins(earlier)))
    plan, _ = plan_from_json(drafting.made(draft, start=file), draft)
    before, _ = plan_from_json(earlier.plan, file)
    assert isinstance(plan.start, ReleasedStart)
    assert plan.start.adapter.hex() == earlier.adapter
    assert (plan.start.plan, plan.start.round) == (before.digest(), 6)
    assert earlier.norm <= plan.start.largest_norm < earlier.norm * 1.02
    with pytest.raises(PlanError, match="registry"):
        read_plan(draft)


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ('federation = "clinics"', 'federation = "others"', "federation"),
        ('labels = ["a", "b"]', 'labels = ["b", "a"]', "task"),
        ("rank = 2", "rank = 3", "lora.tensors"),
        ("alpha = 4.0", "alpha = 8.0", "lora.alpha"),
    ],
)
def test_an_earlier_adapter_must_mean_the_same(
    tmp_path: Path, tiny_model: Path, old: str, new: str, field: str
) -> None:
    earlier = earlier_of(tmp_path, tiny_model, old, new)
    path = write_draft(tmp_path, tiny_model, 'start = "released"\njob = "triage-0"')
    draft = read_draft(path)
    with pytest.raises(PlanError) as caught:
        started(make_plan(draft, tmp_path), draft, tmp_path, earlier)
    assert caught.value.field == field


def test_a_draft_cannot_understate_the_norm_of_an_earlier_adapter(
    tmp_path: Path, tiny_model: Path
) -> None:
    path = write_draft(tmp_path, tiny_model, 'start = "released"\njob = "x"\nlargest_norm = 0.5')
    draft = read_draft(path)
    with pytest.raises(PlanError) as caught:
        started(make_plan(draft, tmp_path), draft, tmp_path, earlier_of(tmp_path, tiny_model))
    assert caught.value.field == "start.largest_norm"
