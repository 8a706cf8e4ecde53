"""Phenotypes with a definition, by organ system, from a file in the OBO format."""

from pathlib import Path

import pytest

from umbel_common.errors import DataError
from umbel_simulations.inputs.hpo import Phenotype, is_for_test, phenotypes

OBO = """format-version: 1.2

[Term]
id: HP:0000118
name: Phenotypic abnormality

[Term]
id: HP:1
name: Heart
is_a: HP:0000118 ! Phenotypic abnormality

[Term]
id: HP:2
name: Lung
is_a: HP:0000118 ! Phenotypic abnormality

[Term]
id: HP:3
name: Arrhythmia
def: "A rhythm of the heart that is \\"not\\" regular." [PMID:1]
is_a: HP:1 ! Heart

[Term]
id: HP:4
name: Tachyarrhythmia
def: "A rhythm of the heart that is too fast." [PMID:2]
is_a: HP:3 ! Arrhythmia

[Term]
id: HP:5
name: Of both
def: "Something of lungs and of the heart at once." []
is_a: HP:2 ! Lung
is_a: HP:1 ! Heart

[Term]
id: HP:6
name: Gone
def: "A term that nobody uses any longer." []
is_a: HP:2 ! Lung
is_obsolete: true

[Term]
id: HP:7
name: The same
def: "A Rhythm of the heart that is too fast." []
is_a: HP:1 ! Heart

[Term]
id: HP:8
name: Brief
def: "Short." []
is_a: HP:1 ! Heart

[Term]
id: HP:9
name: Mode of inheritance
def: "Not below any organ system at all." []

[Typedef]
id: part_of
name: part of
"""


def test_definitions_come_with_the_organ_system(tmp_path: Path) -> None:
    path = tmp_path / "hp.obo"
    path.write_text(OBO)
    assert list(phenotypes(path)) == [
        Phenotype("Arrhythmia", 'A rhythm of the heart that is "not" regular.', "Heart"),
        Phenotype("Tachyarrhythmia", "A rhythm of the heart that is too fast.", "Heart"),
        Phenotype("Of both", "Something of lungs and of the heart at once.", "Heart"),
    ]


def test_a_share_is_for_testing_whatever_else_there_is() -> None:
    made = [Phenotype(f"term {number}", "x", "Heart") for number in range(2000)]
    chosen = [one for one in made if is_for_test(one)]
    assert 240 < len(chosen) < 360
    assert all(is_for_test(Phenotype(one.name, "other", "Lung")) for one in chosen)


@pytest.mark.parametrize("content", [b"", b"[Term]\nid: HP:1\nname: x\n", b"\xff"])
def test_what_is_no_ontology_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "hp.obo"
    path.write_bytes(content)
    with pytest.raises(DataError):
        list(phenotypes(path))
