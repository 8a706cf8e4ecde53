"""Rows of files that Arrow reads: Parquet, and folders of Hugging Face `datasets`.

A column is read when it is asked for, and its values are then plain ones of Python's. Libraries are
imported where they are needed: it takes a second, which other kinds of file need not wait.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from umbel_client.data.rows import (
    GuardedRow,
    OnWrongRow,
    Table,
    different,
    not_utf_8,
    table_of,
    unreadable,
)
from umbel_common.errors import DataError
from umbel_host.processes.lifecycle import reason

_PARTS = ("dataset_info.json", "state.json")
"""Files without which no folder is a data set."""
_FEW = 3
"""Files of a folder that an error names."""


def parquet_rows(path: Path, on_wrong_row: OnWrongRow) -> Table:
    """The rows of a Parquet file; see `tables.read_table`. All of them can be parsed."""
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
    except pyarrow.ArrowException as error:
        raise unreadable(
            path,
            f"no Parquet file, or a part of one ({type(error).__name__})",
            remedy="copy it again, or write it again",
        ) from None

    places = {own: (name, before) for own, name, before in different(names)}

    def column(own: str) -> Any:
        name, before = places[own]
        found = file.read(columns=[name])
        return [found.column(i) for i, one in enumerate(found.column_names) if one == name][before]

    return _arrow_table(path, file.schema_arrow, file.metadata.num_rows, column)


def folder_rows(path: Path, on_wrong_row: OnWrongRow) -> Table:
    """The rows of a folder that `save_to_disk` wrote; see `tables.read_table`."""
    import datasets
    from datasets.exceptions import DatasetsError

    datasets.disable_progress_bars()
    try:
        found = datasets.load_from_disk(str(path), keep_in_memory=True)
    except (DatasetsError, ValueError, TypeError, OSError, KeyError, IndexError) as error:
        if isinstance(error, IndexError) and not any(path.glob("*.arrow")):
            # The library writes a data set without a row, and cannot read it.
            return table_of((), (), ())
        raise _no_data_set(path, error) from None
    if isinstance(found, datasets.DatasetDict):
        raise DataError(
            "a folder holds several data sets",
            file=path,
            found=", ".join(map(str, found)),
            accepted="the folder of one of them",
        )
    # The format that was set before it was saved comes back with it.
    plain_values = found.with_format("arrow")

    def column(name: str) -> Any:
        found: Any = plain_values.select_columns([name])[:]
        return found.column(name)

    return _arrow_table(path, found.data.schema, len(found), column)


def _no_data_set(path: Path, error: Exception) -> DataError:
    """What is wrong with a folder that the library cannot read."""
    names = sorted(file.name for file in path.iterdir())
    found = ", ".join(names[:_FEW]) + (f" and {len(names) - _FEW} more" * (len(names) > _FEW))
    records = [name for name in names if name.endswith((".parquet", ".jsonl", ".csv"))]
    lacking = [name for name in _PARTS if name not in names]
    if lacking == [*_PARTS]:
        wrong, remedy = "no data set", "give the file with the records, or the folder of a data set"
    else:
        wrong, remedy = _damage(error, lacking), "copy the whole folder again"
    if records:
        remedy = f"give one file: {records[0]}"
        remedy += ", with the rows of all of them" if len(records) > 1 else ""
    return unreadable(
        path,
        f"{wrong}; in the folder: {found or 'nothing'}",
        "a file of records (.jsonl, .csv, .parquet), or a folder that save_to_disk of Hugging Face"
        " datasets wrote, with all of its files",
        remedy,
    )


def _damage(error: Exception, lacking: Sequence[str]) -> str:
    """What is wrong with a folder that has a part of a data set."""
    if lacking:
        return f"a data set without {' and '.join(lacking)}"
    if isinstance(error, OSError) and error.filename is not None:
        name = Path(error.filename).name
        return f"a data set whose file {name} cannot be read: {reason(error)}"
    return f"a data set with a file that is damaged ({type(error).__name__})"


def _class_names(schema: Any) -> dict[str, list[str]]:
    """The names of the classes of each column whose numbers stand for names.

    Hugging Face `datasets` keeps them beside the columns, also in Parquet. Two sites may number
    the same names in different ways, so the numbers mean nothing without them.
    """
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {
            column: feature["names"]
            for column, feature in features.items()
            if feature.get("_type") == "ClassLabel" and feature.get("names")
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def _arrow_table(path: Path, schema: Any, count: int, column: Callable[[str], Any]) -> Table:
    names = schema.names
    columns = _ArrowColumns(path, names, column, _class_names(schema))
    rows = [_ArrowRow(columns, index) for index in range(count)]
    return table_of(names, rows, range(1, count + 1))


class _ArrowColumns:
    """The columns of a file of Arrow's, each read when it is asked for."""

    def __init__(
        self,
        path: Path,
        names: Sequence[str],
        read: Callable[[str], Any],
        classes: Mapping[str, Sequence[str]],
    ) -> None:
        self.path = path
        self.names = [own for own, _, _ in different(names)]
        self._read = read
        self._classes = classes
        self._known: dict[str, list[object]] = {}
        self._arrays: dict[str, Any] = {}

    def values(self, name: str) -> list[object]:
        """The values of a column; what cannot be used is an error in its place."""
        if name not in self._known:
            if name not in self.names:
                raise KeyError(name)
            array = self._array(name)
            try:
                self._known[name] = array.to_pylist()
            except Exception:
                # Value by value it takes ten times as long, but tells which row it is. The
                # libraries promise no classes of errors.
                self._arrays[name] = array
                self._known[name] = [
                    self._value(name, number, scalar) for number, scalar in enumerate(array, 1)
                ]
            if name in self._classes:
                self._known[name] = [self._named(name, value) for value in self._known[name]]
        return self._known[name]

    def _named(self, column: str, value: object) -> object:
        """The name of a class; -1 stands for none. A number without a name stays one."""
        names = self._classes[column]
        if not isinstance(value, int) or value >= len(names):
            return value
        return names[value] if value >= 0 else None

    def as_text(self, name: str, index: int) -> str:
        """A value that cannot be used, as a text."""
        import pyarrow

        if name not in self._arrays:
            return "unreadable"
        scalar = self._arrays[name][index]
        try:
            if hasattr(scalar, "as_buffer"):
                return bytes(scalar.as_buffer()).decode("utf-8", "backslashreplace")
            return str(scalar.cast(pyarrow.string()).as_py())
        except Exception:
            # Such as a moment of a zone that nobody knows: the number that it is stored as.
            value = getattr(scalar, "value", None)
            return str(value) if isinstance(value, int) else "unreadable"

    def _array(self, name: str) -> Any:
        try:
            return self._read(name)
        except Exception as error:
            raise DataError(
                "a column of the data file cannot be read",
                file=self.path,
                field=name,
                found=type(error).__name__,
            ) from None

    def _value(self, name: str, number: int, scalar: Any) -> object:
        try:
            return scalar.as_py()
        except UnicodeDecodeError as error:
            return not_utf_8(self.path, f"row {number}", error.object[error.start])
        except Exception as error:
            return DataError(
                f"row {number} has a value that cannot be read",
                file=self.path,
                field=f"{name}, row {number}",
                found=f"{scalar.type}: {type(error).__name__}",
                accepted="texts, numbers, and dates from the year 1 to the year 9999",
                remedy="write the column as texts",
            )


class _ArrowRow(GuardedRow):
    """A row of a file of Arrow's."""

    def __init__(self, columns: _ArrowColumns, index: int) -> None:
        self._columns = columns
        self._index = index

    def __getitem__(self, column: str) -> object:
        value = self._columns.values(column)[self._index]
        if isinstance(value, DataError):
            # It would otherwise grow by a traceback each time.
            raise value.with_traceback(None)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns.names)

    def __len__(self) -> int:
        return len(self._columns.names)

    def as_text(self, column: str) -> str:
        """See `GuardedRow`."""
        return self._columns.as_text(column, self._index)
