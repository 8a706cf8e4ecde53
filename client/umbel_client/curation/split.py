"""Training, validation and test records of one file, with no record in two of them.

Records that must stay together form a group: those of one unit, and those that are the same. If two
patients have the same record, both are in one group, and so on: groups are the connected components
of "of one unit, or the same". Where short phrases repeat, one group can hold nearly all patients.
Then units alone may decide, and records that an earlier part has are left out of later parts.
"""

import os
import shutil
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

from umbel_client.curation.examples import Examples, Group
from umbel_client.data.tables import json_lines
from umbel_common.canonical import digest
from umbel_common.errors import DataError, StorageError
from umbel_host.files.durable import create, sync_folder
from umbel_host.files.output import require_new

PARTS = ("train", "validation", "test")
"""Names of the files, in the order of the shares."""


def inseparable(units: Sequence[int], keys: Sequence[Hashable]) -> list[Group]:
    """The records that must stay together, in the order of the file.

    Args:
        units: the unit of each record.
        keys: the key of each record; records with equal keys are the same.
    """
    parent = list(range(len(units)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    for names in (units, keys):
        first: dict[Hashable, int] = {}
        for index, name in enumerate(names):
            parent[root(index)] = root(first.setdefault(name, index))
    groups: dict[int, Group] = {}
    for index in range(len(units)):
        groups.setdefault(root(index), []).append(index)
    return list(groups.values())


def divide(
    groups: Sequence[Group], labels: Sequence[str] | None, shares: Sequence[float], seed: int
) -> list[Group]:
    """Deals groups out to parts by their shares of the records, in an order that the seed decides.

    The groups of one label follow each other. Each goes to the part that is furthest behind its
    share so far, so that every label is spread like the whole. A group of several labels counts for
    the label of its first record.

    Args:
        labels: the label of each record; None: there are no labels.
        shares: the share of each part, not negative, with sum 1.

    Returns:
        The records of each part in rising order.
    """

    def place(group: Group) -> tuple[str, bytes]:
        label = "" if labels is None else labels[group[0]]
        # A digest gives the same order under every version of Python and NumPy.
        return label, digest("data-split", f"{seed} {group[0]}".encode())

    parts: list[Group] = [[] for _ in shares]
    dealt = 0
    for group in sorted(groups, key=place):
        dealt += len(group)
        behind = [share * dealt - len(part) for share, part in zip(shares, parts, strict=True)]
        parts[behind.index(max(behind))] += group
    return [sorted(part) for part in parts]


@dataclass(frozen=True)
class Split:
    """The records of a file in parts."""

    parts: list[Group]
    """Indices of the records of each part."""
    groups: list[Group]
    """The records that were kept together."""
    left_out: int
    """Number of records in no part, because an earlier part has the same."""


def split_examples(
    examples: Examples, shares: Sequence[float], seed: int, *, leave_out: bool = False
) -> Split:
    """Deals the records of a file out to parts.

    Args:
        shares: the shares of train, validation and test, with sum 1.
        leave_out: equal records do not keep their units together; those that an earlier part has
            are left out of later parts.

    Raises:
        DataError: a part that has a share would get no record.
    """
    keys = examples.keys
    groups = inseparable(examples.units, range(len(keys)) if leave_out else keys)
    parts = without_earlier(divide(groups, examples.labels, shares, seed), keys)
    for name, part, share in zip(PARTS, parts, shares, strict=True):
        if share > 0 and not part:
            raise DataError(
                f"no record is left for {name}",
                file=examples.path,
                found=f"{len(examples)} records in {len(groups)} groups that must stay together,"
                f" the largest of {max(map(len, groups))}",
                remedy="give it a larger share or the share 0, or --repeated leave-out",
            )
    return Split(parts, groups, len(examples) - sum(map(len, parts)))


def without_earlier(parts: Sequence[Group], keys: Sequence[Hashable]) -> list[Group]:
    """Each part without the records that an earlier part has."""
    seen: set[Hashable] = set()
    kept = []
    for part in parts:
        kept.append([row for row in part if keys[row] not in seen])
        seen.update(keys[row] for row in part)
    return kept


def write_parts(folder: Path, examples: Examples, parts: Sequence[Group]) -> None:
    """Writes a file of JSON lines for each part that has records, readable by its owner only.

    The folder appears on disk complete, or not at all.

    Raises:
        DataError: the data file changed since it was read.
        StorageError: the folder exists, or cannot be written.
    """
    require_new(folder)
    lines = json_lines(examples.path, examples.table)
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(mode=0o700, parents=True)
        for name, part in zip(PARTS, parts, strict=True):
            if part:
                create(partial / f"{name}.jsonl", b"".join(lines[row] for row in part), 0o600)
        # This fails if meanwhile a file, or a folder that is not empty, has this name.
        partial.rename(folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise StorageError("a split cannot be written", file=folder, found=error.strerror) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
