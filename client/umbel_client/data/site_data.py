"""A site's records as they are when its trainer starts: read once, before any plan asks for them.

This module is part of the core of the privacy guarantee. Never read a file again because a server
asked for something, and never let a plan decide how a file is read.

A record that is no record at all (without a text, with a label that the policy does not name) is a
mistake of the site's people, and stops the site as it starts. It is not left out, since then nobody
would mend it. Whether a record fits a plan is asked later, when its round is paid for
(`umbel_client.tasks.prepared`). A file that changes while the site runs changes nothing until the
site starts again.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from umbel_client.data.records import (
    LmRecords,
    Records,
    columns_of,
    label_text,
    records_of,
)
from umbel_client.data.rows import Table
from umbel_client.data.tables import read_table
from umbel_client.site.config import ClientConfig
from umbel_client.site.policy import TaskName
from umbel_common.errors import DataError
from umbel_common.plans.alike import alike, shown, told
from umbel_common.plans.plan import CausalLm, Classification, Task

_FAR_OFF = 2.0
"""Factor between the number of units and the public size from which a person is told."""
_SHOWN = 5
_NOBODY = frozenset(
    {"-", "--", ".", "?", "??", "unknown", "missing", "undefined", "anonymous", "x"}
)
"""What people write where they do not know whose a record is."""


# No generated repr: it would write records into whatever log it is printed to.
@dataclass(frozen=True, repr=False)
class SiteData:
    """The records, for each task that the site's policy allows, or why they cannot be had."""

    read: Mapping[TaskName, Records | LmRecords]
    failed: Mapping[TaskName, DataError]
    public_size: int
    labels: Sequence[str] = ()
    """The labels that the policy names."""

    @classmethod
    def load(cls, config: ClientConfig) -> "SiteData":
        """Reads the site's file once. What is wrong with it is kept and not raised."""
        path = Path(config.data.path)
        read: dict[TaskName, Records | LmRecords] = {}
        failed: dict[TaskName, DataError] = {}
        table: Table | None = None
        for name, task in _tasks(config):
            try:
                table = table or read_table(path)
                read[name] = records_of(path, table, task, **columns_of(config.data))
            except DataError as error:
                failed[name] = error
        return cls(read, failed, config.data.public_size, config.policy.labels)

    def records(self, task: Task) -> Records | LmRecords:
        """The records for a plan's task.

        Raises:
            DataError: they cannot be read so; it says what is wrong with the file.
        """
        name: TaskName = "causal-lm" if isinstance(task, CausalLm) else "classification"
        if name in self.failed:
            # It would otherwise grow by a traceback with each request.
            raise self.failed[name].with_traceback(None)
        if name not in self.read:
            raise DataError("this site's policy allows no such task", field="policy.tasks")
        return self.read[name]

    def require(self) -> None:
        """Refuses data that no task can use.

        Raises:
            DataError: what is wrong with the file.
        """
        if self.failed and not self.read:
            raise next(iter(self.failed.values()))

    @property
    def source(self) -> bytes | None:
        """Digest of the data file, 32 bytes; None if no task can use the file."""
        return next((records.source for records in self.read.values()), None)

    @property
    def data_set(self) -> bytes | None:
        """The name of the data set in its ledger, 32 bytes; None if no task can use the file."""
        return next((records.digest() for records in self.read.values()), None)

    def warnings(self) -> Iterator[str]:
        """Yields what the site's people should know of the data, a sentence each."""
        for task, error in self.failed.items():
            if self.read:
                yield f"no plan for {task} can run with these records: {error.message}"
        for records in list(self.read.values())[:1]:
            yield from warnings_of(records, self.public_size, self.labels)


def _tasks(config: ClientConfig) -> Iterator[tuple[TaskName, Task]]:
    """Each task that plans may have here, in the form that takes most records."""
    policy = config.policy
    if "classification" in policy.tasks and len({*policy.labels}) == len(policy.labels) > 1:
        yield "classification", Classification(labels=policy.labels)
    if "causal-lm" in policy.tasks:
        yield "causal-lm", CausalLm(loss_on="all")


def warnings_of(
    records: Records | LmRecords, public_size: int | None, labels: Sequence[str] = ()
) -> Iterator[str]:
    """Yields what the owner of records should know of them, a sentence each.

    Args:
        public_size: the number of units that everyone may know; None: it is not used.
        labels: those of the plan or the policy.
    """
    found = records.unit_count
    kind = "records" if records.unit_column is None else "units"
    if public_size and not public_size / _FAR_OFF <= found <= public_size * _FAR_OFF:
        yield (
            f"data.public_size is {public_size:,}, and there are {found:,} {kind}: batches are"
            f" {found / public_size:.2g} times as large as planned, and delta is held to one tenth"
            " of 1 / public_size"
        )
    pairs = alike(records.unit_names)
    if pairs:
        yield (
            f"units look alike: {_some(told(pairs))}. If they are one person, this person counts"
            f" twice: give {records.unit_column} one value for each person"
        )
    yield from _nobodies(records)
    yield from label_warnings(records, labels)


def _nobodies(records: Records | LmRecords) -> Iterator[str]:
    counts = Counter(records.units)
    for number, name in enumerate(records.unit_names):
        if name.casefold() in _NOBODY and counts[number] > 1:
            yield (
                f"the unit {shown(name)} has {counts[number]:,} records: if it says that nobody"
                " knows whose they are, give each record a value of its own, or leave it out"
            )


def label_warnings(records: Records | LmRecords, labels: Sequence[str]) -> Iterator[str]:
    """Yields which labels of a plan or a policy look alike, or have no record."""
    pairs = alike(labels)
    if pairs:
        yield f"labels look alike: {_some(told(pairs))}"
    if not isinstance(records, Records) or not labels:
        return
    known = {record.label for record in records.records}
    absent = [label_text(label) for index, label in enumerate(labels) if index not in known]
    if absent:
        yield f"{len(absent)} of {len(labels)} labels have no record here: {_some(absent)}"


def _some(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return ", ".join(texts[:_SHOWN]) + more
