"""Requests and kits are read back as they were written, and refused if anything in them changed."""

import json

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from umbel_common.address import Address
from umbel_common.canonical import encode
from umbel_common.errors import IdentityError, SignatureError
from umbel_common.trust import enrolment
from umbel_common.trust.enrolment import (
    SignedKit,
    SignedRequest,
    SiteKit,
    check_kit,
    check_request,
    kit_from_json,
    kit_to_json,
    public_pem,
    request_from_json,
    request_to_json,
    sign_kit,
    sign_request,
)
from umbel_common.trust.identity import Identity

NORTH, OPERATOR, THIEF = (Identity(bytes([number]) * 32) for number in range(1, 4))
KEY = ec.generate_private_key(ec.SECP384R1())
OTHER_KEY = ec.generate_private_key(ec.SECP384R1())

KIT = SiteKit(
    federation="clinics",
    site="north",
    server="umbel.example.org:9443",
    server_ca="ca",
    certificate="certificate",
    roster="{}",
)


def asked() -> SignedRequest:
    return sign_request("clinics", "north", NORTH, KEY)


def resigned(signed: SignedRequest, signer: Identity, **changes: object) -> SignedRequest:
    """A request that was changed and signed again, but without a new proof by the relay key."""
    request = msgspec.structs.replace(signed.request, **changes)
    return SignedRequest(request, signer.sign("SiteRequest", encode(request)))


def test_a_request_is_read_back_and_names_its_relay_key() -> None:
    read = request_from_json(request_to_json(asked()), "file")
    assert read.request.site == "north"
    assert public_pem(check_request(read, "file")) == public_pem(KEY.public_key())


def test_a_kit_is_read_back_and_holds_for_its_operator() -> None:
    kit = sign_kit(KIT, OPERATOR)
    assert kit_from_json(kit_to_json(kit), "file") == kit
    check_kit(kit, OPERATOR.public_key, "file")


@pytest.mark.parametrize("field", ["federation", "site", "server", "server_ca", "certificate"])
def test_a_kit_with_anything_changed_is_not_the_operators(field: str) -> None:
    changed = msgspec.structs.replace(KIT, **{field: "changed"})
    forged = SignedKit(changed, sign_kit(KIT, OPERATOR).signature)
    with pytest.raises(SignatureError, match="not signed by the operator"):
        check_kit(forged, OPERATOR.public_key, "file")


def test_a_kits_signature_is_good_for_no_other_purpose() -> None:
    kit = SignedKit(KIT, OPERATOR.sign("SiteRequest", encode(KIT)))
    with pytest.raises(SignatureError):
        check_kit(kit, OPERATOR.public_key, "file")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("federation", "other"),
        ("site", "south"),
        ("relay_key", public_pem(OTHER_KEY.public_key())),
        ("identity", THIEF.public_key),
    ],
)
def test_the_relay_key_vouches_for_everything_that_is_asked(
    field: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thief of an identity can sign anything with it, but does not have the relay's key."""
    signer = THIEF if field == "identity" else NORTH
    forged = resigned(asked(), signer, **{field: value})
    with pytest.raises(SignatureError, match="proof"):
        check_request(forged, "file")
    # The proof stops the thief: a key that finds every proof good lets the request through.
    monkeypatch.setattr(enrolment, "load_pem_public_key", lambda _: Gullible(forged))
    monkeypatch.setattr(enrolment.ec, "EllipticCurvePublicKey", Gullible)
    check_request(forged, "file")


class Gullible:
    """A relay key that finds every signature good."""

    curve = ec.SECP384R1()

    def __init__(self, forged: SignedRequest) -> None:
        self._pem = forged.request.relay_key

    def verify(self, *_: object) -> None:
        pass

    def public_bytes(self, *_: object) -> bytes:
        return self._pem.encode()


def test_a_request_by_somebody_without_the_identity_is_refused() -> None:
    request = asked().request
    with pytest.raises(SignatureError, match="signature"):
        check_request(SignedRequest(request, THIEF.sign("SiteRequest", encode(request))), "file")


def relay_keys() -> dict[str, str]:
    pem = public_pem(KEY.public_key())
    return {
        "nothing": "",
        "no PEM": "no PEM",
        "another curve": public_pem(ec.generate_private_key(ec.SECP256R1()).public_key()),
        "a second text of one key": pem + "\n",
        "with words before it": "ours:\n" + pem,
        "not ASCII": pem + "\N{SNOWMAN}",
    }


@pytest.mark.parametrize("kind", relay_keys())
def test_a_relay_key_has_one_curve_and_one_text(kind: str) -> None:
    """The port looks relays up by this text, and two sites must not have the same key."""
    with pytest.raises(IdentityError, match="no usable relay key"):
        check_request(resigned(asked(), NORTH, relay_key=relay_keys()[kind]), "file")


def test_no_site_is_called_like_the_operator() -> None:
    with pytest.raises(ValueError, match="operator"):
        sign_request("clinics", "operator", NORTH, KEY)
    parts = json.loads(request_to_json(asked())) | {"site": "operator"}
    with pytest.raises(IdentityError, match="malformed") as caught:
        request_from_json(json.dumps(parts), "file")
    assert "no site may be called operator" in caught.value.diagnostics()


BAD_PARTS = [
    {"site": "../north"},
    {"site": "North"},
    {"site": ""},
    {"site": None},
    {"federation": "a/b"},
    {"identity": "00" * 31},
    {"identity": "zz" * 32},
    {"signature": "00" * 63},
    {"signature": ""},
    {"proof": "z"},
    {"relay_key": "x" * 9000},
    {"private_key": "surprise"},
]


@pytest.mark.parametrize("change", BAD_PARTS, ids=lambda change: next(iter(change)))
def test_a_request_with_a_wrong_field_is_refused_and_names_its_file(
    change: dict[str, object],
) -> None:
    parts = json.loads(request_to_json(asked())) | change
    with pytest.raises(IdentityError, match="a site's request is malformed") as caught:
        request_from_json(json.dumps(parts), "north.json")
    assert caught.value.file == "north.json"


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", "{" * 5000, '{"site": 1}', "\ud800"])
def test_what_is_no_request_or_kit_at_all_is_refused(text: str) -> None:
    for read in (request_from_json, kit_from_json):
        with pytest.raises(IdentityError, match="malformed"):
            read(text, "file")


ADDRESSES = {
    "umbel.example.org:9443": True,
    "10.0.0.7:443": True,
    "[2001:db8::1]:9443": True,
    "umbel_server:9443": True,
    "host": False,
    "host:": False,
    ":9443": False,
    "host:9443\n": False,
    'host"\nsocket = "x:1': False,
    'h"x:1': False,
    "h\\x:1": False,
    "https://host:1": False,
    "user@host:1": False,
    "::1:9443": False,
    "a b:1": False,
    "h" * 400 + ":1": False,
}


@pytest.mark.parametrize(("address", "good"), ADDRESSES.items())
def test_an_address_is_a_host_and_a_port_and_cannot_hold_a_line_of_toml(
    address: str, good: bool
) -> None:
    text = kit_to_json(sign_kit(msgspec.structs.replace(KIT, server=address), OPERATOR))
    if good:
        assert msgspec.convert(address, Address) == address
        assert kit_from_json(text, "file").kit.server == address
    else:
        with pytest.raises(IdentityError, match="a kit is malformed"):
            kit_from_json(text, "file")
