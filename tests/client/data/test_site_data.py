"""What a site reads when it starts, and what it tells its people of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from umbel_client.data.records import LmRecords, Records
from umbel_client.data.site_data import SiteData
from umbel_client.site.config import ClientConfig, DataConfig, ModelConfig
from umbel_client.site.policy import Policy
from umbel_common.errors import DataError
from umbel_common.plans.plan import CausalLm, Classification

ROWS = [{"text": f"w{n}", "label": "ab"[n % 2], "patient": f"p{n // 2}"} for n in range(8)]
TASK = Classification(labels=("a", "b"))


def site(folder: Path, rows: list[dict[str, str]] | str, **data: Any) -> SiteData:
    path = folder / "data.jsonl"
    text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text)
    policy = data.pop("policy", Policy(labels=("a", "b")))
    return SiteData.load(
        ClientConfig(
            site="north",
            state="state",
            identity="identity.pem",
            roster="roster.json",
            data=DataConfig(path=str(path), **{"public_size": 8, **data}),
            model=ModelConfig(path="model"),
            policy=policy,
        )
    )


def test_records_are_read_for_each_task_that_the_policy_allows(tmp_path: Path) -> None:
    found = site(tmp_path, ROWS, policy=Policy(labels=("a", "b"), tasks=("classification",)))
    assert isinstance(found.records(TASK), Records)
    with pytest.raises(DataError, match="allows no such task"):
        found.records(CausalLm())
    both = Policy(labels=("a", "b"), tasks=("classification", "causal-lm"))
    found = site(tmp_path, ROWS, policy=both)
    assert isinstance(found.records(CausalLm()), LmRecords)
    (tmp_path / "data.jsonl").unlink()
    assert len(found.records(TASK)) == 8


def test_a_policy_without_labels_reads_nothing_and_complains_of_nothing(tmp_path: Path) -> None:
    found = site(tmp_path, "no records", policy=Policy())
    found.require()
    assert not found.read


def test_a_mistake_in_the_file_is_kept_for_the_sites_people(tmp_path: Path) -> None:
    found = site(tmp_path, [*ROWS, {**ROWS[0], "label": "c"}])
    for _ in range(2):
        with pytest.raises(DataError, match="row 9 has a label"):
            found.records(TASK)
    with pytest.raises(DataError, match="row 9 has a label"):
        found.require()


def test_a_file_for_one_task_of_two_serves_that_one(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}] * 8
    both = Policy(labels=("a", "b"), tasks=("classification", "causal-lm"))
    found = site(tmp_path, rows, policy=both)
    found.require()
    assert len(found.records(CausalLm())) == 8
    (warning,) = found.warnings()
    assert "no plan for classification" in warning


@pytest.mark.parametrize(("public_size", "told"), [(8, False), (4, False), (3, True), (80, True)])
def test_a_public_size_that_is_far_off_is_told(
    tmp_path: Path, public_size: int, told: bool
) -> None:
    found = list(site(tmp_path, ROWS, public_size=public_size).warnings())
    assert bool(found) == told
    assert all(f"{public_size:,}" in warning and "8 records" in warning for warning in found)


def test_units_that_look_alike_are_told(tmp_path: Path) -> None:
    rows = [*ROWS, {**ROWS[0], "patient": "P0"}]
    (warning,) = site(tmp_path, rows, unit_column="patient").warnings()
    assert "'p0' and 'P0'" in warning


def test_what_is_printed_shows_no_record(tmp_path: Path) -> None:
    assert "w1" not in repr(site(tmp_path, ROWS))


def test_labels_without_a_record_and_units_of_nobody_are_told(tmp_path: Path) -> None:
    rows = [*ROWS, *[{**ROWS[0], "patient": "unknown"}] * 2]
    policy = Policy(labels=("a", "b", "c", "A"))
    found = list(
        site(tmp_path, rows, unit_column="patient", public_size=5, policy=policy).warnings()
    )
    assert [text for text in found if "no record" in text] == [
        "2 of 4 labels have no record here: 'c', 'A'"
    ]
    assert any("labels look alike: 'a' and 'A'" in text for text in found)
    assert any("the unit 'unknown' has 2 records" in text for text in found)


def test_records_with_a_label_that_the_policy_lacks_are_counted(tmp_path: Path) -> None:
    found = site(tmp_path, [*ROWS, *[{**ROWS[0], "label": "c"}] * 3])
    with pytest.raises(DataError) as caught:
        found.require()
    assert "labels of rows that the plan lacks: 'c' 3" in str(caught.value.remedy)
