import os

import pytest

from umbel_common.canonical import Value
from umbel_common.errors import IdentityError, RemoteProtocolError
from umbel_common.trust.identity import (
    Identity,
    Member,
    Roster,
    Signed,
    fingerprint,
    is_fingerprint_of,
    open_signed,
    sign,
    verifies,
)


class Promise(Value, frozen=True):
    what: str


class Threat(Value, frozen=True):
    what: str


def test_a_statement_opens_with_its_signers_key_only() -> None:
    signer, other = Identity.generate(os.urandom), Identity.generate(os.urandom)
    signed = sign(signer, Promise(what="x"))
    assert open_signed(signed, Promise, signer.public_key) == Promise(what="x")
    with pytest.raises(RemoteProtocolError, match="not signed by the pinned identity"):
        open_signed(signed, Promise, other.public_key)


def test_a_statement_does_not_open_as_another_type() -> None:
    signer = Identity.generate(os.urandom)
    with pytest.raises(RemoteProtocolError, match="not signed by the pinned identity"):
        open_signed(sign(signer, Promise(what="x")), Threat, signer.public_key)


def test_a_changed_statement_does_not_open() -> None:
    signer = Identity.generate(os.urandom)
    signed = sign(signer, Promise(what="x"))
    forged = Signed(statement=signed.statement.replace(b"x", b"y"), signature=signed.signature)
    with pytest.raises(RemoteProtocolError, match="not signed by the pinned identity"):
        open_signed(forged, Promise, signer.public_key)


def test_a_key_that_is_no_point_is_a_bad_signature_and_not_a_crash() -> None:
    assert not verifies(b"\xff" * 32, "label", b"data", bytes(64))


def test_an_identity_comes_back_from_its_seed() -> None:
    identity = Identity.generate(os.urandom)
    assert Identity(identity.seed()).public_key == identity.public_key
    with pytest.raises(IdentityError):
        Identity(b"short")


def test_ed25519_is_the_one_of_rfc_8032() -> None:
    seed = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    public = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
    assert Identity(seed).public_key == public


def test_a_fingerprint_is_eight_groups_that_people_can_read() -> None:
    text = fingerprint(bytes(32))
    assert [len(group) for group in text.split("-")] == [4] * 8
    assert text != fingerprint(b"\x01" + bytes(31))


def test_a_roster_names_each_site_and_each_key_once() -> None:
    a, b, c = (Identity.generate(os.urandom).public_key for _ in range(3))
    with pytest.raises(ValueError, match="sorted"):
        Roster(
            federation="f",
            operator=c,
            members=(Member(name="b", public_key=a), Member(name="a", public_key=b)),
        )
    with pytest.raises(ValueError, match="share one key"):
        Roster(
            federation="f",
            operator=c,
            members=(Member(name="a", public_key=a), Member(name="b", public_key=a)),
        )
    with pytest.raises(ValueError, match="share one key"):
        Roster(federation="f", operator=a, members=(Member(name="a", public_key=a),))


def test_a_roster_says_who_it_does_not_know() -> None:
    a, b = (Identity.generate(os.urandom).public_key for _ in range(2))
    roster = Roster(federation="f", operator=a, members=(Member(name="x", public_key=b),))
    with pytest.raises(IdentityError, match="accepted: x"):
        roster.member("y")


def test_a_fingerprint_is_recognised_however_it_is_written() -> None:
    key = bytes(range(32))
    shown = fingerprint(key)
    for text in (
        shown,
        shown.upper(),
        f"  {shown} ",
        shown.replace("-", " "),
        shown.replace("-", ""),
    ):
        assert is_fingerprint_of(text, key)
    for text in ("", shown[:-1], shown[:-1] + "!", fingerprint(bytes(32))):
        assert not is_fingerprint_of(text, key)
