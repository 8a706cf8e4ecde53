"""The committed vectors are what the generator writes and what the product answers."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from vectors import operations

from umbel_common.errors import UmbelError
from umbel_common.protocol.wire import Reply, Request

FOLDER = Path(__file__).parents[2] / "vectors"

DOCUMENTS = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}
SIGNING = ("sign-statement", "digest-statement")
ATTEMPTS = {
    case["name"]: case["inputs"]
    for case in DOCUMENTS["attempt"]["cases"]
    if case["operation"] == "attempt"
}


def cases(expected: str) -> list[Any]:
    return [
        pytest.param(case, id=f"{subject}: {case['name']}")
        for subject, document in DOCUMENTS.items()
        for case in document["cases"]
        if expected in case
    ]


@pytest.mark.parametrize("case", cases("output"))
def test_the_product_gives_the_output_of_a_vector(case: dict[str, Any]) -> None:
    assert operations.perform(case, ATTEMPTS) == case["output"]


@pytest.mark.parametrize("case", cases("failure"))
def test_the_product_fails_in_the_way_that_a_vector_names(case: dict[str, Any]) -> None:
    with pytest.raises(UmbelError) as caught:
        operations.perform(case, ATTEMPTS)
    assert type(caught.value).__name__ == case["failure"]["error"]
    assert getattr(caught.value, "check", None) == case["failure"].get("check")


def test_the_committed_vectors_are_what_the_generator_writes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, FOLDER / "generate.py", tmp_path], check=True)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert written == {path.name: path.read_bytes() for path in FOLDER.glob("*.json")}


def test_every_message_statement_and_operation_has_a_vector() -> None:
    found = [case for document in DOCUMENTS.values() for case in document["cases"]]
    tags = {
        case["output"]["type"]
        for case in found
        if case["operation"] == "open-message" and "output" in case
    }
    assert tags == {kind.__struct_config__.tag for kind in get_args(Request) + get_args(Reply)}
    labels = {case["inputs"]["label"] for case in found if case["operation"] in SIGNING}
    assert labels == set(operations.KINDS)
    assert {case["operation"] for case in found} == set(operations.OPERATIONS)


def test_every_event_of_a_transcript_has_a_vector() -> None:
    events = {
        case["output"]["event"]["event"]
        for case in DOCUMENTS["statements"]["cases"]
        if case["operation"] == "open-statement"
        and case["inputs"]["label"] == "Entry"
        and "output" in case
    }
    fields = {field.name: field.type for field in msgspec.structs.fields(operations.KINDS["Entry"])}
    assert events == {kind.__struct_config__.tag for kind in get_args(fields["event"])}
