"""How a site enrols: it asks with its public keys, and the operator answers with a certificate.

No private key travels. The request is signed by the site's identity and by its relay's key, so
nobody can ask with a key that they do not have. The kit (enrolment bundle) is signed by the
operator. Neither file proves whose it is: people find that out by comparing fingerprints.
"""

from typing import Annotated

import msgspec
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
)

from umbel_common.address import Address
from umbel_common.canonical import Name, V, Value, digest, encode
from umbel_common.errors import IdentityError, SignatureError
from umbel_common.single_keys import decode_document
from umbel_common.trust.identity import (
    SIGNATURE_BYTES,
    Identity,
    PublicKey,
    label_of,
    verifies,
)
from umbel_common.trust.key_statements import OPERATOR

Pem = Annotated[str, msgspec.Meta(max_length=8192)]


class SiteRequest(Value, frozen=True):
    """A site's wish to take part."""

    federation: Name
    site: Name
    identity: PublicKey
    """The public key of the site's identity, which signs everything that the site says."""
    relay_key: Pem
    """The public key of the site's relay, ECDSA P-384, PEM."""
    proof: bytes
    """The relay key's own signature over all fields above."""

    def __post_init__(self) -> None:
        if self.site == OPERATOR:
            raise ValueError(f"no site may be called {OPERATOR}")


class SiteKit(Value, frozen=True):
    """The enrolment bundle: what the operator gives a site that it admits."""

    federation: Name
    site: Name
    server: Address
    """Address at which sites reach the server."""
    server_ca: Pem
    """Certificate of the authority that vouches for the server."""
    certificate: Pem
    """The relay's certificate."""
    roster: str
    """Text of the operator's roster file, a proposal that the site approves or not."""


class SignedRequest(Value, frozen=True):
    """A request, with the signature by its identity."""

    request: SiteRequest
    signature: bytes


class SignedKit(Value, frozen=True):
    """A kit, with the operator's signature."""

    kit: SiteKit
    signature: bytes


def public_pem(key: ec.EllipticCurvePublicKey) -> str:
    """A relay's public key as in requests and in sites.json: SubjectPublicKeyInfo, PEM."""
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def sign_request(
    federation: str, site: str, identity: Identity, relay_key: ec.EllipticCurvePrivateKey
) -> SignedRequest:
    """A request, signed by both keys.

    Raises:
        ValueError: no site may have this name.
    """
    draft = SiteRequest(
        federation=federation,
        site=site,
        identity=identity.public_key,
        relay_key=public_pem(relay_key.public_key()),
        proof=b"",
    )
    proof = relay_key.sign(_proven(draft), ec.ECDSA(hashes.SHA384()))
    request = msgspec.structs.replace(draft, proof=proof)
    return SignedRequest(request, identity.sign(label_of(SiteRequest), encode(request)))


def check_request(signed: SignedRequest, file: object) -> ec.EllipticCurvePublicKey:
    """The relay's public key in a request, if both keys of the request signed it.

    Args:
        file: where the request came from, for errors.

    Raises:
        IdentityError: the relay's key is not an ECDSA P-384 key in its one PEM form.
        SignatureError: one of the two keys did not sign the request.
    """
    request = signed.request
    try:
        key = load_pem_public_key(request.relay_key.encode())
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if (
        not isinstance(key, ec.EllipticCurvePublicKey)
        or not isinstance(key.curve, ec.SECP384R1)
        # The port looks a relay up by this text, so one key must have one text.
        or public_pem(key) != request.relay_key
    ):
        raise IdentityError(
            "a site's request has no usable relay key",
            file=file,
            field="relay_key",
            accepted="an ECDSA P-384 public key, PEM",
            remedy="ask the site to send the file again as `umbel-client init` made it",
        )
    try:
        key.verify(request.proof, _proven(request), ec.ECDSA(hashes.SHA384()))
        proven = True
    except InvalidSignature:
        proven = False
    label = label_of(SiteRequest)
    if not proven or not verifies(request.identity, label, encode(request), signed.signature):
        raise SignatureError(
            "a site's request is not signed by the keys that it names",
            file=file,
            field="signature" if proven else "proof",
            remedy="ask the site to send the file again as `umbel-client init` made it",
        )
    return key


def sign_kit(kit: SiteKit, operator: Identity) -> SignedKit:
    """A kit, signed by the operator."""
    return SignedKit(kit, operator.sign(label_of(SiteKit), encode(kit)))


def check_kit(signed: SignedKit, operator: bytes, file: object) -> None:
    """Refuses a kit that this operator did not sign.

    Raises:
        SignatureError: the signature is not the operator's.
    """
    if not verifies(operator, label_of(SiteKit), encode(signed.kit), signed.signature):
        raise SignatureError(
            "a kit is not signed by the operator",
            file=file,
            remedy="ask the operator for the kit again, and compare fingerprints",
        )


def _proven(request: SiteRequest) -> bytes:
    bare = msgspec.structs.replace(request, proof=b"")
    return digest("relay-key-proof", encode(bare))


def request_to_json(signed: SignedRequest) -> str:
    """A request as a file that people send."""
    return _to_json(signed.request, signed.signature)


def request_from_json(text: str, file: object) -> SignedRequest:
    """Reads what `request_to_json` wrote; its signatures are not checked.

    Raises:
        IdentityError: the text is not JSON, or a field is unknown, missing or wrong.
    """
    request, signature = _from_json(text, SiteRequest, file, "a site's request")
    return SignedRequest(request, signature)


def kit_to_json(signed: SignedKit) -> str:
    """A kit as a file that people send."""
    return _to_json(signed.kit, signed.signature)


def kit_from_json(text: str, file: object) -> SignedKit:
    """Reads what `kit_to_json` wrote; its signature is not checked.

    Raises:
        IdentityError: the text is not JSON, or a field is unknown, missing or wrong.
    """
    kit, signature = _from_json(text, SiteKit, file, "a kit")
    return SignedKit(kit, signature)


def _to_json(value: Value, signature: bytes) -> str:
    parts = {**msgspec.structs.asdict(value), "signature": signature}
    readable = {
        name: part.hex() if isinstance(part, bytes) else part for name, part in parts.items()
    }
    return msgspec.json.format(msgspec.json.encode(readable), indent=2).decode() + "\n"


def _from_json(text: str, kind: type[V], file: object, what: str) -> tuple[V, bytes]:
    try:
        parts = decode_document(text, dict[str, str])
        signature = bytes.fromhex(parts.pop("signature", ""))
        for name in ("identity", "proof"):
            if name in parts:
                parts[name] = bytes.fromhex(parts[name])  # type: ignore[assignment]  # converted next
        value = msgspec.convert(parts, kind)
        if len(signature) != SIGNATURE_BYTES:
            raise ValueError(f"a signature has {2 * SIGNATURE_BYTES} hexadecimal digits")
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise IdentityError(
            f"{what} is malformed",
            file=file,
            found=str(error).replace("`$.", "`"),
            remedy="ask for the file again",
        ) from None
    return value, signature
