"""Which kind of file a file of records is, and what people are told of one that is no such kind.

The name's ending says the kind. A file that programs of offices and data bases write is named for
what it is, with what to do.
"""

import csv
from pathlib import Path

from umbel_common.errors import DataError

FOLDER = "a folder that save_to_disk wrote"
KINDS = (".jsonl", ".csv", ".parquet", FOLDER)
"""The kinds that can be read."""

_AS_CSV = 'save it as "CSV UTF-8 (comma delimited)", with a name that ends in .csv'
_UNPACK = "unpack it"
_AS_PARQUET = "write it as .parquet"
_REMEDIES = {
    ".json": "write one object a line, and end the name in .jsonl: jq -c '.[]' FILE > FILE.jsonl"
    " does it for a list; a file that has one object a line already needs the new name only",
    ".ndjson": "rename it: one JSON object a line is .jsonl here",
    ".jsonlines": "rename it: one JSON object a line is .jsonl here",
    ".ldjson": "rename it: one JSON object a line is .jsonl here",
    ".tsv": f"it has tabs between its values: {_AS_CSV}",
    ".tab": f"it has tabs between its values: {_AS_CSV}",
    ".txt": "give it the ending of what is in it: .jsonl or .csv",
    ".xlsx": f"a spreadsheet: {_AS_CSV}",
    ".xlsm": f"a spreadsheet: {_AS_CSV}",
    ".xls": f"a spreadsheet: {_AS_CSV}",
    ".ods": f"a spreadsheet: {_AS_CSV}",
    ".pq": "rename it: .parquet",
    ".parq": "rename it: .parquet",
    ".arrow": f"{_AS_PARQUET}; of a data set, give the folder that it is in",
    ".feather": _AS_PARQUET,
    ".orc": _AS_PARQUET,
    ".gz": _UNPACK,
    ".zip": _UNPACK,
    ".bz2": _UNPACK,
    ".xz": _UNPACK,
    ".zst": _UNPACK,
    ".7z": _UNPACK,
}
_BEGINNINGS = (
    (b"PK\x03\x04", "a spreadsheet or another packed file (ZIP)", f"unpack it, or {_AS_CSV}"),
    (b"\xd0\xcf\x11\xe0", "a spreadsheet of an old kind (.xls)", _AS_CSV),
    (b"\x1f\x8b", "a packed file (gzip)", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "a packed file (zstd)", _UNPACK),
    (b"BZh", "a packed file (bzip2)", _UNPACK),
    (b"PAR1", "a Parquet file", "rename it: .parquet"),
    (b"ARROW1", "an Arrow file", _AS_PARQUET),
    (b"SQLite format 3", "a data base (SQLite)", "export a table as .csv"),
)
"""What files begin with that are no texts: bytes, what they are, and what to do."""
_UTF_16 = (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")
_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_FIRST = 64
_LONGEST_HEADER = 65_536


def kind_of(path: Path) -> str:
    """The kind of a file, one of `KINDS`; upper case in its ending does not matter.

    Raises:
        DataError: it is none of them; says what it is, and what to do.
    """
    if path.is_dir():
        return FOLDER
    suffix = path.suffix.lower()
    if suffix in KINDS:
        return suffix
    raise DataError(
        "the data file is of an unknown kind",
        file=path,
        found=path.suffix or "no suffix",
        accepted=", ".join(KINDS),
        remedy=_REMEDIES.get(suffix),
    )


def require_utf_8(path: Path, beginning: bytes) -> None:
    """Refuses a file that is no text in UTF-8, where its first bytes say so.

    Raises:
        DataError: says what it is, and what to do.
    """
    for sign, name, remedy in _BEGINNINGS:
        if beginning.startswith(sign):
            raise DataError(
                f"a file whose name ends in {path.suffix} is something else",
                file=path,
                found=name,
                accepted="text in UTF-8",
                remedy=remedy,
            )
    first = beginning[:_FIRST]
    if first.startswith(_UTF_16) or first.count(0) * 3 > len(first):
        raise DataError(
            "the data file is not UTF-8",
            file=path,
            found="UTF-16 (or UTF-32), as some programs of Windows write it",
            accepted="UTF-8",
            remedy="convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW; or save it as UTF-8",
        )


def separator_error(path: Path, text: str) -> DataError | None:
    """What is wrong with a CSV file whose header has another sign than commas between the names."""
    first = next(iter(text[:_LONGEST_HEADER].splitlines()), "")

    def fields(separator: str) -> int:
        return len(next(csv.reader([first], delimiter=separator), []))

    most = max(_SEPARATORS, key=fields)
    if fields(most) <= fields(","):
        return None
    return DataError(
        f"the values of a CSV file stand between {_SEPARATORS[most]}",
        file=path,
        field="line 1",
        found=_SEPARATORS[most],
        accepted="commas",
        remedy=_AS_CSV,
    )
