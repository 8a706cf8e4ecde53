"""ICD-10-CM as a classification task: the text of a diagnosis, and the chapter it belongs to.

The tabular list (US National Center for Health Statistics, public domain) ships inside the package
`simple-icd-10-cm`. Its data file is read; the package is never imported.
"""

import hashlib
import importlib.util
import xml.etree.ElementTree as ET  # reads an installed package's own file
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from umbel_common.canonical import Value
from umbel_common.errors import DataError
from umbel_host.installation import install

CHAPTERS = {
    1: "01 infectious diseases",
    2: "02 neoplasms",
    3: "03 blood and immune system",
    4: "04 endocrine and metabolic",
    5: "05 mental and behavioural",
    6: "06 nervous system",
    7: "07 eye",
    8: "08 ear",
    9: "09 circulatory system",
    10: "10 respiratory system",
    11: "11 digestive system",
    12: "12 skin",
    13: "13 musculoskeletal system",
    14: "14 genitourinary system",
    15: "15 pregnancy and childbirth",
    16: "16 perinatal conditions",
    17: "17 congenital malformations",
    18: "18 symptoms and signs",
    21: "21 health services",
}
"""The labels. Injuries (19) and external causes (20) are lists of near-repetitions, and chapter 22
has a handful of codes, so the task leaves these three out."""

TEST_SHARE = 0.2
"""Share of the three-character categories whose texts are in the test set."""

_PACKAGE = "simple_icd_10_cm"
_SPLIT_KEY = b"umbel-icd10cm"


class Diagnosis(Value, frozen=True):
    """A description or an inclusion term of the tabular list."""

    text: str
    chapter: str
    """One of `CHAPTERS`."""
    category: str
    """The first three characters of its code."""
    code: str


def read_diagnoses(label: Literal["chapter", "category"] = "chapter") -> list[Diagnosis]:
    """Every text that occurs with only one label, once, in the order of the list.

    Raises:
        DataError: the package is not installed, or does not hold the list.
    """
    first: dict[str, Diagnosis] = {}
    ambiguous = set()
    for diagnosis in _every_text():
        kept = first.setdefault(diagnosis.text.casefold(), diagnosis)
        if getattr(kept, label) != getattr(diagnosis, label):
            ambiguous.add(diagnosis.text.casefold())
    return [diagnosis for text, diagnosis in first.items() if text not in ambiguous]


def read_titles(label: Literal["chapter", "category"]) -> dict[str, str]:
    """The public title of each label: of a chapter its name, of a category its description.

    Raises:
        DataError: see `read_diagnoses`.
    """
    if label == "chapter":
        return {name: name.partition(" ")[2] for name in CHAPTERS.values()}
    titles: dict[str, str] = {}
    for diagnosis in _every_text():
        # Its description comes before its other terms.
        if diagnosis.code == diagnosis.category:
            titles.setdefault(diagnosis.category, diagnosis.text)
    return titles


def _every_text() -> list[Diagnosis]:
    path = _tabular_list()
    try:
        tree = ET.parse(path)  # noqa: S314  # an installed package's own file
        return list(_walk(tree.getroot()))
    except (OSError, ET.ParseError, AttributeError, ValueError) as error:
        raise DataError("the ICD-10-CM list cannot be read", file=path, found=error) from error


def is_for_test(code: str) -> bool:
    """Whether the texts of a code, or of a whole category, are in the test set.

    Where chapters are the labels, a category is in it as a whole or not at all, so no
    near-repetition of a training text is in the test set. A fixed public key makes the split the
    same everywhere.
    """
    digest = hashlib.blake2b(code.encode(), key=_SPLIT_KEY, digest_size=8).digest()
    return int.from_bytes(digest, "big") < TEST_SHARE * 2**64


def _tabular_list() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise DataError(
            "the package that carries ICD-10-CM is not installed",
            field='data.source = "icd10cm"',
            found=f"no package {_PACKAGE}",
            remedy=f"install the demo extra: {install('demo')}",
        )
    folder = Path(spec.origin).parent / "data"
    lists = sorted(folder.glob("icd10c*-tabular*.xml"))
    if len(lists) != 1:
        raise DataError(
            "the package that carries ICD-10-CM does not hold one tabular list",
            file=folder,
            found=", ".join(path.name for path in lists) or "none",
            accepted="one icd10c*-tabular*.xml",
            remedy=f"install the version that the demo extra names: {install('demo')}",
        )
    return lists[0]


def _walk(root: ET.Element) -> Iterator[Diagnosis]:
    for chapter in root.findall("chapter"):
        label = CHAPTERS.get(int(chapter.findtext("name", "")))
        if label is None:
            continue
        for code in chapter.iter("diag"):
            terms = [code.findtext("desc", ""), *_terms(code)]
            name = code.findtext("name", "")
            for term in terms:
                text = " ".join(term.split())
                if text:
                    yield Diagnosis(text=text, chapter=label, category=name[:3], code=name)


def _terms(code: ET.Element) -> list[str]:
    return [note.text or "" for note in code.findall("inclusionTerm/note")]
