"""The committed vectors against a second implementation that shares no code with the product."""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vectors import independent
from vectors.cases import from_json, long_bytes, sample, to_json
from vectors.independent_attempt import Attempt, PreparedAttempt, SharedAgain
from vectors.messagepack import pack


def outputs(subject: str, *operations: str) -> list[Any]:
    """Inputs and output of the accepted cases of some operations."""
    document = json.loads((Path(__file__).parent / f"{subject}.json").read_text())
    return [
        pytest.param(from_json(case["inputs"]), from_json(case["output"]), id=case["name"])
        for case in document["cases"]
        if case["operation"] in operations and "output" in case
    ]


@pytest.mark.parametrize(("inputs", "output"), outputs("shamir", "shamir-split"))
def test_shares_are_values_of_the_polynomial_that_was_drawn(inputs: Any, output: Any) -> None:
    coefficients = [inputs["secret"], *inputs["draws"]]
    assert independent.shares(coefficients, inputs["points"]) == output


@pytest.mark.parametrize(("inputs", "output"), outputs("shamir", "shamir-recover"))
def test_secrets_are_what_lagranges_formula_gives(inputs: Any, output: Any) -> None:
    assert independent.interpolated(inputs["points"], inputs["shares"]) == output


@pytest.mark.parametrize(("inputs", "output"), outputs("keys", "derive"))
def test_keys_are_hkdf_by_hmac(inputs: Any, output: Any) -> None:
    sites = inputs.pop("sites")
    assert independent.derived(*inputs.values(), *sites) == output


@pytest.mark.parametrize(("inputs", "output"), outputs("keys", "seed-commitment"))
def test_commitments_are_labelled_hashes(inputs: Any, output: Any) -> None:
    data = inputs["context"] + inputs["seed"] + independent.framed(inputs["site"])
    assert independent.labelled("seed commitment", data) == output


@pytest.mark.parametrize(("inputs", "output"), outputs("digests", "digest"))
def test_digests_are_sha256_of_the_framed_label_and_the_data(inputs: Any, output: Any) -> None:
    assert independent.labelled(**inputs) == output


@pytest.mark.parametrize(("inputs", "output"), outputs("digests", "fingerprint"))
def test_fingerprints_are_base32_in_groups_of_four(inputs: Any, output: Any) -> None:
    data = independent.labelled("fingerprint", inputs["public_key"])[:20]
    assert output.replace("-", "") == base64.b32encode(data).decode().lower()
    assert [len(group) for group in output.split("-")] == [4] * 8


@pytest.mark.parametrize(("inputs", "output"), outputs("masks", "mask"))
def test_masks_are_aes_of_a_counter_read_little_endian(inputs: Any, output: Any) -> None:
    zeros = [0] * inputs["length"]
    found = independent.masked(zeros, inputs["ring_bits"], inputs["added"], inputs["subtracted"])
    assert long_bytes(found) == output


@pytest.mark.parametrize(("inputs", "output"), outputs("quantise", "quantise"))
def test_deltas_are_rounded_by_the_keystream(inputs: Any, output: Any) -> None:
    delta, encoding = inputs["delta"], inputs["encoding"]
    if not isinstance(delta, bytes):
        words = np.frombuffer(sample(delta["sample"], 4 * delta["length"]), dtype="<u4")
        delta = (words * 2.0**-31 - 1).astype("<f4").tobytes()
    values = independent.quantised(delta, inputs["weight"], encoding, inputs["rounding_key"])
    size = encoding["ring_bits"] // 8
    assert long_bytes(b"".join(value.to_bytes(size, "little") for value in values)) == output


@pytest.mark.parametrize(
    ("inputs", "output"), outputs("statements", "sign-statement", "digest-statement")
)
def test_statements_are_messagepack_maps_in_the_order_of_their_fields(
    inputs: Any, output: Any
) -> None:
    assert pack(inputs["fields"]) == output["statement"]
    assert independent.labelled(inputs["label"], output["statement"]) == output["digest"]
    if "seed" in inputs:
        found = independent.statement(inputs["seed"], inputs["label"], inputs["fields"])
        assert found["signature"] == output["signature"]


@pytest.mark.parametrize(("inputs", "output"), outputs("messages", "seal-message"))
def test_messages_are_magic_signature_and_body(inputs: Any, output: Any) -> None:
    body = pack(inputs["fields"])
    preposition = "to" if inputs["direction"] == "request" else "from"
    label = f"{inputs['direction']} {preposition} {inputs['site']}"
    if "request" in inputs:
        label += f" to {inputs['request'].hex()}"
    signature = independent.signed(inputs["seed"], label, body)
    assert output == {"body": body, "sealed": b"UMB2" + signature + body}


@pytest.mark.parametrize(("inputs", "output"), outputs("attempt", "attempt"))
def test_a_whole_attempt_follows_from_what_its_sites_drew(inputs: Any, output: Any) -> None:
    assert to_json(Attempt(inputs).whole()) == to_json(output)


@pytest.mark.parametrize(("inputs", "output"), outputs("attempt", "prepared-attempt"))
def test_a_prepared_attempt_follows_from_what_its_sites_drew(inputs: Any, output: Any) -> None:
    kind = SharedAgain if "restarted" in inputs else PreparedAttempt
    assert to_json(kind(inputs).whole()) == to_json(output)


def test_messagepack_by_hand_gives_the_bytes_of_the_specification() -> None:
    """The formats of https://github.com/msgpack/msgpack/blob/master/spec.md, written out."""
    assert pack({"a": 1, "b": [True, None, "x" * 32]}).hex() == (
        "82a16101a16293c3c0d920" + "78" * 32
    )
    assert pack([127, 128, 256, 65536, 2**32]).hex() == (
        "957fcc80cd0100ce00010000cf0000000100000000"
    )
    assert pack([b"\x01", 1.5]).hex() == "92c40101cb3ff8000000000000"
