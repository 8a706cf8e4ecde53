"""Sources: ICD-10-CM as it ships, and a developer's own files."""

from collections import Counter
from pathlib import Path

import msgspec
import pytest
from datasets import Dataset

from umbel_client.data.records import load_records
from umbel_common.errors import DataError
from umbel_common.plans.plan import CausalLm, Classification
from umbel_simulations.inputs import icd10
from umbel_simulations.inputs.icd10 import CHAPTERS, is_for_test, read_diagnoses
from umbel_simulations.inputs.partition import partition, unit_count, write_site_data
from umbel_simulations.inputs.sources import Corpus, Example, load_source, repeated_for_test
from umbel_simulations.scenario.file import find_scenario
from umbel_simulations.scenario.scenario import FileData, Icd10Data, Scenario, Sites


def scenario_on(data: Icd10Data | FileData, **parts: object) -> Scenario:
    return msgspec.structs.replace(find_scenario("smoke"), data=data, **parts)


def files(folder: Path, train: str, test: str, suffix: str = ".jsonl") -> FileData:
    (folder / f"train{suffix}").write_text(train, encoding="utf-8")
    (folder / f"test{suffix}").write_text(test, encoding="utf-8")
    return FileData(train=str(folder / f"train{suffix}"), test=str(folder / f"test{suffix}"))


@pytest.fixture(scope="module")
def icd() -> Corpus:
    return load_source(scenario_on(Icd10Data(records_per_label=1500)))


def test_icd_has_nineteen_chapters_and_the_sizes_that_the_documentation_states(
    icd: Corpus,
) -> None:
    assert icd.labels == tuple(sorted(CHAPTERS.values()))
    assert len(icd.labels) == 19
    assert len(icd.train) + len(icd.test) == 25_468
    assert (len(icd.train), len(icd.test)) == (20_712, 4_756)


def test_icd_never_has_a_category_in_both_training_and_test_set(icd: Corpus) -> None:
    train = {example.group for example in icd.train}
    test = {example.group for example in icd.test}
    assert train
    assert test
    assert not train & test
    assert all(is_for_test(group) for group in test)


def test_icd_never_repeats_a_text(icd: Corpus) -> None:
    texts = [example.text.casefold() for example in (*icd.train, *icd.test)]
    assert len(set(texts)) == len(texts)


def test_icd_caps_each_chapter(icd: Corpus) -> None:
    counts = Counter(example.label for example in (*icd.train, *icd.test))
    assert max(counts.values()) == 1500
    assert set(counts) == set(icd.labels)


def test_icd_takes_descriptions_and_inclusion_terms() -> None:
    chapter = {diagnosis.text: diagnosis.chapter for diagnosis in read_diagnoses()}
    assert chapter["Cholera due to Vibrio cholerae 01, biovar eltor"] == CHAPTERS[1]
    assert chapter["Cholera eltor"] == CHAPTERS[1]


def use_list(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Puts another list in the place of the one that ships."""
    package = folder / "simple_icd_other"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')", encoding="utf-8")
    (package / "data" / "icd10c-tabular-test.xml").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(icd10, "_PACKAGE", "simple_icd_other")


def test_icd_drops_a_text_that_stands_in_two_chapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chapter(number: int, *texts: str) -> str:
        codes = "".join(
            f"<diag><name>A0{index}</name><desc>{text}</desc></diag>"
            for index, text in enumerate(texts)
        )
        return f"<chapter><name>{number}</name>{codes}</chapter>"

    use_list(
        tmp_path,
        monkeypatch,
        f"<x>{chapter(1, 'both', 'one', 'ONE')}{chapter(2, 'Both', 'two  words')}"
        f"{chapter(19, 'a wound')}</x>",
    )
    assert [diagnosis.text for diagnosis in read_diagnoses()] == ["one", "two words"]


def test_icd_by_category_has_other_codes_for_the_test_and_titles_for_a_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def code(name: str, text: str, inner: str = "") -> str:
        return f"<diag><name>{name}</name><desc>{text}</desc>{inner}</diag>"

    categories = ("A00", "A01", "A02")
    codes = "".join(
        code(
            category,
            f"title {category}",
            "".join(code(f"{category}.{n}", f"text {category} {n}") for n in range(40))
            + code(f"{category}.99", "in each"),
        )
        for category in categories
    )
    use_list(tmp_path, monkeypatch, f"<x><chapter><name>1</name>{codes}</chapter></x>")
    corpus = load_source(scenario_on(Icd10Data(label="category")))
    assert corpus.labels == categories
    assert corpus.titles == {category: f"title {category}" for category in categories}
    train, test = ({one.text for one in part} for part in (corpus.train, corpus.test))
    assert not train & test
    assert train | test == {f"text {category} {n}" for category in categories for n in range(40)}
    assert test == {text for text in train | test if is_for_test("{1}.{2}".format(*text.split()))}
    chapters = load_source(scenario_on(Icd10Data()))
    assert chapters.titles["02 neoplasms"] == "neoplasms"


def test_icd_without_its_package_says_which_extra_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(icd10, "_PACKAGE", "no_such_package")
    with pytest.raises(DataError) as caught:
        read_diagnoses()
    assert ".[demo]" in str(caught.value.remedy)


def test_samples_follow_the_seed_and_leave_each_other_alone(icd: Corpus) -> None:
    data = Icd10Data(train_records=50, test_records=40, records_per_label=1500)
    first = load_source(scenario_on(data))
    assert (len(first.train), len(first.test)) == (50, 40)
    assert load_source(scenario_on(data)) == first
    assert load_source(scenario_on(data, seed=8)).test != first.test
    larger = load_source(scenario_on(msgspec.structs.replace(data, train_records=60)))
    assert larger.test == first.test
    assert set(first.test) <= set(icd.test)
    assert first.labels == icd.labels


JSONL = '{"text": "a cough", "label": "lung"}\n{"text": "a rash", "label": "skin"}\n'


def test_json_lines_are_read(tmp_path: Path) -> None:
    corpus = load_source(scenario_on(files(tmp_path, JSONL, JSONL)))
    assert corpus.labels == ("lung", "skin")
    assert corpus.train == (
        Example(text="a cough", label="lung"),
        Example(text="a rash", label="skin"),
    )


def test_csv_is_read_with_its_quotes_and_byte_order_mark(tmp_path: Path) -> None:
    text = '\ufefflabel,text\n0,"a ""dry"", hacking cough"\n1,a rash\n'
    corpus = load_source(scenario_on(files(tmp_path, text, text, ".csv")))
    assert corpus.test[0] == Example(text='a "dry", hacking cough', label="0")


def test_numbers_in_json_become_label_names(tmp_path: Path) -> None:
    text = '{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n'
    assert load_source(scenario_on(files(tmp_path, text, text))).labels == ("0", "1")


def test_the_partition_column_is_kept_and_not_asked_of_the_test_set(tmp_path: Path) -> None:
    train = '{"text": "a", "label": "x", "ward": 3}\n{"text": "a", "label": "y", "ward": "w"}\n'
    data = files(tmp_path, train, '{"text": "b", "label": "x"}\n')
    sites = Sites(count=3, partition="column", column="ward")
    corpus = load_source(scenario_on(data, sites=sites))
    assert [example.group for example in corpus.train] == ["3", "w"]


def test_a_label_is_capped_in_the_training_file_only(tmp_path: Path) -> None:
    rows = "".join(f'{{"text": "t{n}", "label": "{"xy"[n == 0]}"}}\n' for n in range(10))
    data = msgspec.structs.replace(files(tmp_path, rows, rows), records_per_label=4)
    corpus = load_source(scenario_on(data))
    assert (len(corpus.train), len(corpus.test)) == (5, 10)


@pytest.mark.parametrize(
    ("train", "test", "field"),
    [
        ('{"text": "a"}', JSONL, "label"),
        (JSONL + '{"text": "a"}', JSONL, "label, row 3"),
        (JSONL + '{"text": "  ", "label": "x"}', JSONL, "text, row 3"),
        (JSONL + '{"text": null, "label": "x"}', JSONL, "text, row 3"),
        (JSONL + '{"text": "a", "label": true}', JSONL, "label, row 3"),
        (JSONL + "[1]\n", JSONL, "row 3"),
        (JSONL + "\n" + JSONL, JSONL, "row 3"),
        ("secret\n", JSONL, "row 1"),
        (JSONL, '{"text": "a", "label": "heart"}\n', "label, row 1"),
        (JSONL, JSONL + '{"text": "\\ud83d", "label": "lung"}\n', "text, row 3"),
        ('{"text": "a", "label": "x"}', JSONL, "label"),
        ("", JSONL, None),
    ],
)
def test_a_faulty_file_is_refused_by_file_and_row(
    tmp_path: Path, train: str, test: str, field: str | None
) -> None:
    data = files(tmp_path, train, test)
    with pytest.raises(DataError) as caught:
        load_source(scenario_on(data))
    assert caught.value.field == field
    assert str(caught.value.file) in {data.train, data.test}
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("name", ["missing.jsonl", "data.xlsx", "folder.csv"])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.csv").mkdir()
    path = str(tmp_path / name)
    with pytest.raises(DataError) as caught:
        load_source(scenario_on(FileData(train=path, test=path)))
    assert str(caught.value.file) == path


@pytest.mark.parametrize(
    ("name", "content", "field"),
    [
        ("a.csv", b"text,label\na,x\nb,y\nfever,cough,x\n", "row 3"),
        ("a.csv", b"text;label\na;x\n", "line 1"),
        ("a.csv", "text,label\na,x\n".encode("utf-16"), None),
        ("a.jsonl", b'{"text": "a", "label": "x"}\n\n', "row 2"),
        ("a.jsonl", b'{"text": "\xe4", "label": "x"}\n{"text": "b", "label": "y"}', "line 1"),
        ("a.parquet", b"PAR1", None),
    ],
)
def test_a_simulation_refuses_what_a_site_refuses(
    tmp_path: Path, name: str, content: bytes, field: str | None
) -> None:
    """The same row, in the same words."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as at_site:
        load_records(path, Classification(labels=("x", "y")))
    with pytest.raises(DataError) as simulated:
        load_source(scenario_on(FileData(train=str(path), test=str(path))))
    assert simulated.value.diagnostics() == at_site.value.diagnostics()
    assert simulated.value.field == field


TURNS = [{"role": role, "content": role} for role in ("system", "user", "assistant")]
FORMATS: dict[str, list[dict[str, object]]] = {
    "messages": [{"messages": TURNS}, {"messages": TURNS[1:]}],
    "prompt-completion": [{"prompt": "q", "completion": "a"}] * 2,
    "instruction": [{"instruction": "q", "output": "a", "input": "more"}] * 2,
    "text": [{"text": "a passage"}] * 2,
}


@pytest.mark.parametrize("kind", [".jsonl", ".parquet", ""])
@pytest.mark.parametrize("record_format", FORMATS)
def test_a_language_models_records_are_those_that_its_sites_read(
    tmp_path: Path, record_format: str, kind: str
) -> None:
    """In each format and kind of file, with the patient of each."""
    rows = [{**row, "who": f"p{n}", "ward": n} for n, row in enumerate(FORMATS[record_format])]
    path = tmp_path / f"a{kind}"
    if kind == ".jsonl":
        path.write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
    elif kind == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        Dataset.from_list(rows).save_to_disk(str(path))
    data = FileData(train=str(path), test=str(path), unit_column="who")
    sites = Sites(count=3, partition="column", column="ward")
    task = CausalLm(loss_on="all")
    corpus = load_source(scenario_on(data, sites=sites, task=task))
    assert [example.group for example in corpus.train] == ["0", "1"]
    assert corpus.labels == ()
    write_site_data(tmp_path / "site", corpus.train)
    read = load_records(tmp_path / "site" / "data.jsonl", task, unit_column="unit")
    there = load_records(path, task, unit_column="who")
    assert (read.records, read.unit_names) == (there.records, there.unit_names)


def test_each_site_may_have_a_file_of_its_own(tmp_path: Path) -> None:
    """Of another kind each; a name at one site is not that of another site's patient."""
    rows = [{"text": f"t{n}", "label": "xy"[n % 2], "who": f"p{n // 2}"} for n in range(6)]
    (tmp_path / "a.csv").write_text("text,label,who\nfirst,x,p0\nsecond,z,p1\n")
    Dataset.from_list(rows).to_parquet(tmp_path / "b.parquet")
    Dataset.from_list(rows[:2]).save_to_disk(str(tmp_path / "c"))
    (tmp_path / "test.jsonl").write_text('{"text": "t", "label": "z"}\n')
    files = {"north": "a.csv", "east": "b.parquet", "south": "c"}
    data = FileData(
        train={site: str(tmp_path / file) for site, file in files.items()},
        test=str(tmp_path / "test.jsonl"),
        unit_column="who",
    )
    sites = Sites(count=3, names=tuple(files), partition="files")
    corpus = load_source(scenario_on(data, sites=sites))
    assert corpus.labels == ("x", "y", "z")
    parts = partition(corpus.train, sites, 7)
    assert {site: len(part) for site, part in parts.items()} == {"north": 2, "east": 6, "south": 2}
    assert [example.text for example in parts["north"]] == ["first", "second"]
    assert [unit_count(part) for part in parts.values()] == [2, 3, 1]
    assert repeated_for_test(corpus) == 0
    (tmp_path / "test.jsonl").write_text('{"text": " t0 ", "label": "z"}\n')
    assert repeated_for_test(load_source(scenario_on(data, sites=sites))) == 1
    Dataset.from_list(rows).to_parquet(tmp_path / "c.parquet")
    assert isinstance(data.train, dict)
    data.train["south"] = str(tmp_path / "c.parquet")
    with pytest.raises(DataError, match="two sites have the same records") as caught:
        load_source(scenario_on(data, sites=sites))
    assert (caught.value.field, caught.value.found) == ("data.train.south", "the records of east")
