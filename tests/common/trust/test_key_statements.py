"""A rotation needs both keys, a revocation its signer; neither fits another purpose or content."""

import os

import msgspec
import pytest

from umbel_common.canonical import decode_canonical, encode
from umbel_common.trust.identity import Identity, Signed, open_signed, sign
from umbel_common.trust.key_statements import (
    KeyRotation,
    Revocation,
    SignedRevocation,
    SignedRotation,
    revoke,
    rotate,
)

OLD, NEW, THIEF = (Identity(bytes([number]) * 32) for number in (1, 2, 3))


def test_a_rotation_holds_when_the_old_and_the_new_key_signed_it() -> None:
    signed = rotate("clinics", "north", OLD, NEW)
    assert signed.verifies()
    assert signed.rotation == KeyRotation("clinics", "north", OLD.public_key, NEW.public_key)


def test_a_rotation_without_the_old_keys_signature_does_not_hold() -> None:
    rotation = KeyRotation("clinics", "north", OLD.public_key, THIEF.public_key)
    by_thief = sign(THIEF, rotation).signature
    assert not SignedRotation(rotation, by_old=by_thief, by_new=by_thief).verifies()


def test_a_rotation_to_a_key_that_its_holder_did_not_sign_does_not_hold() -> None:
    rotation = KeyRotation("clinics", "north", OLD.public_key, NEW.public_key)
    by_old = sign(OLD, rotation).signature
    assert not SignedRotation(rotation, by_old=by_old, by_new=by_old).verifies()


def test_the_two_signatures_of_a_rotation_do_not_change_places() -> None:
    signed = rotate("clinics", "north", OLD, NEW)
    swapped = SignedRotation(signed.rotation, by_old=signed.by_new, by_new=signed.by_old)
    assert not swapped.verifies()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("federation", "banks"),
        ("party", "south"),
        ("new_key", THIEF.public_key),
        ("old_key", THIEF.public_key),
    ],
)
def test_a_signed_rotation_says_nothing_else_than_what_was_signed(
    field: str, value: object
) -> None:
    signed = rotate("clinics", "north", OLD, NEW)
    changed = msgspec.structs.replace(signed.rotation, **{field: value})
    assert not msgspec.structs.replace(signed, rotation=changed).verifies()


def test_a_rotation_to_the_same_key_is_none() -> None:
    with pytest.raises(ValueError, match="two different keys"):
        rotate("clinics", "north", OLD, OLD)


def test_a_revocation_holds_when_its_signer_signed_it() -> None:
    assert revoke("clinics", OLD.public_key, OLD).verifies()
    assert revoke("clinics", OLD.public_key, NEW).signer == NEW.public_key


def test_a_revocation_in_the_name_of_another_signer_does_not_hold() -> None:
    signed = revoke("clinics", OLD.public_key, THIEF)
    assert not msgspec.structs.replace(signed, signer=OLD.public_key).verifies()


@pytest.mark.parametrize(("field", "value"), [("federation", "banks"), ("key", NEW.public_key)])
def test_a_signed_revocation_says_nothing_else_than_what_was_signed(
    field: str, value: object
) -> None:
    signed = revoke("clinics", OLD.public_key, OLD)
    changed = msgspec.structs.replace(signed.revocation, **{field: value})
    assert not msgspec.structs.replace(signed, revocation=changed).verifies()


def test_a_signature_of_another_kind_of_statement_does_not_sign_a_revocation() -> None:
    revocation = Revocation("clinics", OLD.public_key)
    other = OLD.sign("KeyRotation", encode(revocation))
    assert not SignedRevocation(revocation, OLD.public_key, other).verifies()


def test_statements_are_canonical_and_open_like_every_other_signed_statement() -> None:
    identity = Identity.generate(os.urandom)
    signed = rotate("clinics", "north", OLD, identity)
    opened = open_signed(
        Signed(statement=encode(signed.rotation), signature=signed.by_new),
        KeyRotation,
        identity.public_key,
    )
    assert opened == signed.rotation
    assert decode_canonical(encode(signed), SignedRotation) == signed
