"""Parts of a file: nothing in two of them, near their shares, and the same for the same seed."""

import os
import resource
import stat
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given

from umbel_client.curation.examples import Examples, read_examples
from umbel_client.curation.split import (
    PARTS,
    divide,
    inseparable,
    split_examples,
    without_earlier,
    write_parts,
)
from umbel_client.site.config import DataConfig
from umbel_common.errors import DataError, StorageError

SHARES = (0.8, 0.1, 0.1)


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
    return path


def examples(path: Path, rows: list[dict[str, Any]], unit: str | None = None) -> Examples:
    data = DataConfig(path="", public_size=1, unit_column=unit)
    return read_examples(written(path, rows), data, None)


@st.composite
def files(draw: st.DrawFn) -> tuple[list[int], list[str], list[str]]:
    """Units, keys and labels of the records of a file."""
    record = st.tuples(st.integers(0, 30), st.integers(0, 60), st.sampled_from("ab"))
    drawn = draw(st.lists(record, min_size=1, max_size=80))
    return [u for u, _, _ in drawn], [str(k) for _, k, _ in drawn], [x for _, _, x in drawn]


@given(files(), st.integers(0, 5))
def test_no_unit_and_no_record_is_in_two_parts(
    file: tuple[list[int], list[str], list[str]], seed: int
) -> None:
    units, keys, labels = file
    groups = inseparable(units, keys)
    parts = divide(groups, labels, SHARES, seed)
    assert sorted(row for part in parts for row in part) == list(range(len(units)))
    for names in (units, keys):
        for one in range(3):
            for other in range(one):
                assert not {names[row] for row in parts[one]} & {names[row] for row in parts[other]}
    assert parts == divide(groups, labels, SHARES, seed)


@given(files())
def test_no_more_stays_together_than_must(file: tuple[list[int], list[str], list[str]]) -> None:
    """Within a group every record is reached from the first, by one unit or one content a step."""
    units, keys, _ = file
    for group in inseparable(units, keys):
        reached, left = [group[0]], set(group[1:])
        for row in reached:
            next_ = {r for r in left if units[r] == units[row] or keys[r] == keys[row]}
            reached += sorted(next_)
            left -= next_
        assert not left


def test_a_record_of_two_patients_brings_both_into_one_part() -> None:
    units = [0, 0, 1, 1, 2, 3]
    keys = ["a", "b", "b", "c", "c", "d"]
    assert inseparable(units, keys) == [[0, 1, 2, 3, 4], [5]]
    assert inseparable(range(6), keys) == [[0], [1, 2], [3, 4], [5]]


@pytest.mark.parametrize("shares", [SHARES, (0.5, 0.25, 0.25), (0.9, 0.0, 0.1), (1.0, 0.0, 0.0)])
def test_parts_of_single_records_have_their_shares_in_every_label(
    shares: tuple[float, ...],
) -> None:
    labels = ["a"] * 100 + ["b"] * 300 + ["c"] * 40
    parts = divide([[row] for row in range(440)], labels, shares, seed=3)
    for part, share in zip(parts, shares, strict=True):
        assert abs(len(part) - 440 * share) <= 1
        found = Counter(labels[row] for row in part)
        assert all(abs(found[label] - share * labels.count(label)) <= 2 for label in "abc")


def test_another_seed_gives_another_split() -> None:
    groups = [[row] for row in range(50)]
    splits = [divide(groups, None, SHARES, seed) for seed in (0, 0, 1, 2)]
    assert splits[0] == splits[1]
    assert len({str(split) for split in splits}) == 3


def test_a_seed_means_the_same_split_for_ever() -> None:
    parts = divide([[row] for row in range(20)], None, SHARES, seed=7)
    assert parts[1:] == [[5, 7], [13, 16]]


def test_words_are_the_same_however_they_are_spaced(tmp_path: Path) -> None:
    found = examples(
        tmp_path / "a.jsonl",
        [
            {"prompt": "one  two", "completion": "x\n"},
            {"prompt": " one\ttwo", "completion": "x"},
            {"prompt": "one two", "completion": "y"},
            {"prompt": "onetwo", "completion": "x"},
        ],
    )
    assert [len(group) for group in inseparable(found.units, found.keys)] == [2, 1, 1]


def test_a_text_with_another_label_is_the_same_text(tmp_path: Path) -> None:
    """It would be asked in one part what was told in the other."""
    rows = [{"text": "x", "label": "a"}, {"text": "x", "label": "b"}, {"text": "y", "label": "a"}]
    found = examples(tmp_path / "a.jsonl", rows)
    assert [len(group) for group in inseparable(found.units, found.keys)] == [2, 1]


def test_a_turn_of_another_role_is_another_record(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    system = [{"role": "system", "content": "x"}, {"role": "assistant", "content": "y"}]
    found = examples(tmp_path / "a.jsonl", [{"messages": turns}, {"messages": system}])
    assert len(set(found.keys)) == 2


def test_short_phrases_join_everybody_unless_they_are_left_out(tmp_path: Path) -> None:
    rows = [{"text": f"{text} {n}", "patient": n} for n in range(100) for text in "abc"]
    common = [{"text": "no finding", "patient": n} for n in range(100)]
    found = examples(tmp_path / "a.jsonl", [*rows, *common], "patient")
    with pytest.raises(DataError, match="no record is left for validation"):
        split_examples(found, SHARES, seed=0)
    split = split_examples(found, SHARES, seed=0, leave_out=True)
    assert list(map(len, split.parts)) == [320, 30, 30]
    assert split.left_out == 20
    for names in (found.units, found.keys):
        sets = [{names[row] for row in part} for part in split.parts]
        assert len(set().union(*sets)) == sum(map(len, sets))


@given(files(), st.integers(0, 5))
def test_what_is_left_out_is_in_an_earlier_part(
    file: tuple[list[int], list[str], list[str]], seed: int
) -> None:
    units, keys, labels = file
    parts = divide(inseparable(units, range(len(units))), labels, SHARES, seed)
    kept = without_earlier(parts, keys)
    assert kept[0] == parts[0]
    for number, (before, after) in enumerate(zip(parts, kept, strict=True)):
        earlier = {keys[row] for part in parts[:number] for row in part}
        assert {keys[row] for row in set(before) - set(after)} <= earlier
        assert not earlier & {keys[row] for row in after}


def test_a_part_without_records_is_refused_unless_its_share_is_nothing(tmp_path: Path) -> None:
    rows = [{"text": str(number)} for number in range(5)]
    found = examples(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match="no record is left for test") as caught:
        split_examples(found, SHARES, seed=0)
    assert "5 records in 5 groups" in str(caught.value.found)
    parts = split_examples(found, (0.8, 0.2, 0.0), seed=0).parts
    assert list(map(len, parts)) == [4, 1, 0]
    write_parts(tmp_path / "out", found, parts)
    assert sorted(os.listdir(tmp_path / "out")) == ["train.jsonl", "validation.jsonl"]


TEXTS = [{"text": f"note {number}", "patient": number // 3} for number in range(30)]


def test_files_hold_the_lines_of_their_rows_and_are_their_owners_only(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        found = examples(tmp_path / "a.jsonl", TEXTS, "patient")
        parts = split_examples(found, SHARES, seed=1).parts
        out = tmp_path / "deep" / "out"
        write_parts(out, found, parts)
    finally:
        os.umask(old)
    lines = (tmp_path / "a.jsonl").read_bytes().splitlines(keepends=True)
    for name, part in zip(PARTS, parts, strict=True):
        file = out / f"{name}.jsonl"
        assert file.read_bytes() == b"".join(lines[row] for row in part)
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(out.stat().st_mode) == 0o700
    assert os.listdir(out.parent) == ["out"]


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "broken link"])
def test_nothing_is_written_over(tmp_path: Path, kind: str) -> None:
    found = examples(tmp_path / "a.jsonl", TEXTS)
    parts = split_examples(found, SHARES, seed=1).parts
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "broken link":
        out.symlink_to("nowhere")
    else:
        out.mkdir()
        if kind == "folder":
            (out / "train.jsonl").write_text("mine")
    before = sorted((path, path.lstat()) for path in tmp_path.rglob("*"))
    with pytest.raises(StorageError, match="in the way"):
        write_parts(out, found, parts)
    assert sorted((path, path.lstat()) for path in tmp_path.rglob("*")) == before


def test_a_disk_that_takes_no_more_leaves_nothing_behind(tmp_path: Path) -> None:
    """In a process of its own: no file of it may be larger than the training part."""
    file = written(tmp_path / "a.jsonl", [{"text": f"{number:0100}"} for number in range(1000)])

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    arguments = ("data", "split", file, "--by", "record", "--out", tmp_path / "out")
    done = subprocess.run(
        [sys.executable, "-m", "umbel_client.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        preexec_fn=small_files,
    )
    assert done.returncode == StorageError.exit_code, done.stderr
    assert "File too large" in done.stderr
    assert os.listdir(tmp_path) == ["a.jsonl"]
