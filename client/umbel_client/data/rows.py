"""Rows of a file of records, and what is wrong with one."""

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from umbel_common.canonical import Digest
from umbel_common.errors import DataError

Row = Mapping[str, object]
"""A row's values by column; in a CSV file all are texts. JSON lines may leave columns out.

Raises, where a column is asked for:
    DataError: its value is one that cannot be used, such as a text with half a character.
"""


class GuardedRow(Mapping[str, object]):
    """A row with values that cannot be used as they are; each is refused where it is asked for."""

    @abstractmethod
    def as_text(self, column: str) -> str:
        """A value that cannot be used, as a text for a file."""


@dataclass(frozen=True)
class Table:
    """The rows of a file."""

    columns: tuple[str, ...]
    """The columns that occur, in the order of their first appearance; see `different`."""
    rows: Sequence[Row]
    """The rows in the order of the file."""
    source: Digest
    """SHA-256 of the file; for a folder, over its Arrow files in their order."""
    numbers: Sequence[int]
    """Number of each row in the file; people count them from 1, without a header."""
    twice: frozenset[str] = frozenset()
    """Columns of this name that the file has several times; nobody may ask for them."""

    def numbered(self) -> Iterator[tuple[int, Row]]:
        """Yields each row with its number in the file."""
        return zip(self.numbers, self.rows, strict=True)

    def alone(self, index: int) -> "Table":
        """The table with one of its rows."""
        return replace(self, rows=[self.rows[index]], numbers=[self.numbers[index]])

    def empty(self) -> "Table":
        """The table without its rows."""
        return replace(self, rows=[], numbers=[])


OnWrongRow = Callable[[int, DataError], None]
"""Called with the number of a row that cannot be parsed, and what is wrong with it."""


def different(names: Sequence[str]) -> list[tuple[str, str, int]]:
    """A name of its own for each column, with its name in the file, and how many columns before it
    have that one too. The second `note` becomes `note (2)`."""
    taken, counts = set(names), Counter[str]()
    found = []
    for name in names:
        before = counts[name]
        counts[name] += 1
        own, number = name, before + 1
        while before and own in taken:
            own, number = f"{name} ({number})", number + 1
        taken.add(own)
        found.append((own, name, before))
    return found


def table_of(columns: Sequence[str], rows: Sequence[Row], numbers: Sequence[int]) -> Table:
    """The table of some rows; who reads the file adds its digest.

    Args:
        columns: as the file names them.
    """
    found = different(columns)
    twice = frozenset(name for _, name, before in found if before)
    return Table(tuple(own for own, _, _ in found), rows, b"", numbers, twice)


def not_utf_8(path: Path, place: str, byte: int) -> DataError:
    """What is wrong with a byte that is none of a text."""
    return DataError(
        f"{place} is not UTF-8",
        file=path,
        field=place,
        found=f"byte 0x{byte:02x}",
        accepted="UTF-8",
        remedy="convert the file, for example with iconv",
    )


def malformed(
    path: Path, row: int, found: str, remedy: str | None = None, accepted: str | None = None
) -> DataError:
    """What is wrong with a row that cannot be parsed."""
    return DataError(
        f"row {row} cannot be read",
        file=path,
        field=f"row {row}",
        found=found,
        accepted=accepted,
        remedy=remedy,
    )


def unreadable(
    path: Path, found: str | None, accepted: str | None = None, remedy: str | None = None
) -> DataError:
    """What is wrong with a file that cannot be read at all."""
    return DataError(
        "the data file cannot be read", file=path, found=found, accepted=accepted, remedy=remedy
    )
