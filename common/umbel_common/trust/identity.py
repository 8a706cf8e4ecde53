"""Who says what: Ed25519 identities, signed statements, and the roster that pins every identity.

The law: a statement is signed over a label that names its type, so a signature made for one purpose
fits no other, and a type that is signed is never renamed. Nothing is parsed before its signature is
verified. Signatures are verified against keys from the roster that the verifier itself pinned; no
key is ever taken from a message. `Signed`, `Member`, `Roster` and their next versions never get a
field.
"""

import base64
import re
from typing import Annotated

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from umbel_common.canonical import Entropy, Name, V, Value, decode_canonical, digest, encode
from umbel_common.errors import IdentityError, require

PublicKey = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
"""An Ed25519 public key in raw form."""

SIGNATURE_BYTES = 64


def fingerprint(public_key: bytes) -> str:
    """A public key for people to compare: eight groups of four base32 letters (160 bits)."""
    text = base64.b32encode(digest("fingerprint", public_key)[:20]).decode("ascii").lower()
    return "-".join(text[start : start + 4] for start in range(0, len(text), 4))


def is_fingerprint_of(text: str, public_key: bytes) -> bool:
    """Whether a person wrote a key's fingerprint; case, blanks and hyphens are as they like."""
    return re.sub(r"[\s-]", "", text).lower() == fingerprint(public_key).replace("-", "")


class Identity:
    """A private Ed25519 key. It stays in the process that made or loaded it."""

    def __init__(self, seed: bytes) -> None:
        """Takes the 32 secret bytes of RFC 8032."""
        if len(seed) != 32:
            raise IdentityError(
                "an identity key has the wrong size",
                found=f"{len(seed)} bytes",
                accepted="32 bytes",
            )
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        self.public_key = self._key.public_key().public_bytes_raw()

    @classmethod
    def generate(cls, entropy: Entropy) -> "Identity":
        """A new identity from 32 bytes of `entropy`."""
        return cls(entropy(32))

    def seed(self) -> bytes:
        """The 32 secret bytes, for the owner's key file."""
        return self._key.private_bytes_raw()

    def sign(self, label: str, *parts: bytes | memoryview) -> bytes:
        """A 64-byte signature of `parts`, one after the other, under the purpose `label`.

        Ed25519 signs the labelled SHA-256 digest, so a large body is hashed once and never copied.
        """
        return self._key.sign(digest(label, *parts))


def verifies(public_key: bytes, label: str, data: bytes | memoryview, signature: bytes) -> bool:
    """Whether `signature` is one by `public_key` over `label` and `data`."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, digest(label, data))
    except (InvalidSignature, ValueError):
        return False
    return True


class Signed(Value, frozen=True):
    """A statement, kept in the bytes that were signed, and its signature."""

    statement: bytes
    signature: Annotated[
        bytes, msgspec.Meta(min_length=SIGNATURE_BYTES, max_length=SIGNATURE_BYTES)
    ]


def sign(identity: Identity, statement: Value) -> Signed:
    """Signs a statement under the label of its type."""
    data = encode(statement)
    return Signed(statement=data, signature=identity.sign(label_of(type(statement)), data))


def open_signed(
    signed: Signed,
    kind: type[V] | tuple[type[V], ...],
    public_key: bytes,
    signer: str | None = None,
) -> V:
    """Verifies a statement, then decodes it; nothing unverified is parsed.

    Args:
        kind: the type, or the versions of one; the signature says which version it is, because each
            is signed under its own label.
        signer: name of the key's party, for errors.

    Raises:
        RemoteProtocolError: `pinned-signature` if `public_key` did not sign it as a statement of
            this kind; `malformed-message` if it did, but the statement does not decode.
    """
    versions = kind if isinstance(kind, tuple) else (kind,)
    version = next(
        (
            one
            for one in versions
            if verifies(public_key, label_of(one), signed.statement, signed.signature)
        ),
        None,
    )
    require(
        version is not None,
        "pinned-signature",
        f"a {label_of(versions[0])} is not signed by the pinned identity",
        field=signer,
    )
    return decode_canonical(signed.statement, version or versions)


def label_of(kind: type[Value]) -> str:
    """The purpose under which statements of one type are signed and hashed."""
    return kind.__name__


class Member(Value, frozen=True):
    """One site of the roster."""

    name: Name
    public_key: PublicKey
    weight: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    """Public size class, the weight of this site in a weighted mean."""


class Roster(Value, frozen=True):
    """All parties whose signatures count in a federation, as agreed and pinned by each of them."""

    federation: Name
    operator: PublicKey
    members: tuple[Member, ...]

    def __post_init__(self) -> None:
        names = [member.name for member in self.members]
        keys = [self.operator, *(member.public_key for member in self.members)]
        if names != sorted(set(names)):
            raise ValueError("members must be unique and sorted by name")
        if len(set(keys)) != len(keys):
            raise ValueError("two parties of a roster may not share one key")

    def digest(self) -> bytes:
        """The digest by which parties know that they pinned the same roster, 32 bytes."""
        return digest(label_of(type(self)), encode(self))

    def member(self, name: str) -> Member:
        """The member of that name.

        Raises:
            IdentityError: no member has that name.
        """
        member = self.find(name)
        if member is None:
            raise IdentityError(
                "a site is not in the roster",
                field="site",
                found=name,
                accepted=tuple(member.name for member in self.members),
            )
        return member

    def find(self, name: str) -> Member | None:
        """The member of that name, or None."""
        return next((member for member in self.members if member.name == name), None)


class Member2(Member, frozen=True, kw_only=True):
    """One site of a roster of version 2."""

    public_size: Annotated[int, msgspec.Meta(ge=1, le=1_000_000_000)] | None = None
    """Number of records, about, that the site has told everybody; None: it told nobody. It helps an
    operator to choose a plan's numbers, and no promise depends on it."""


def public_size(member: Member) -> int | None:
    """The public size of a member of either version; None: it told nobody."""
    return member.public_size if isinstance(member, Member2) else None


class Approver(Value, frozen=True):
    """A person of the operator whose signature approves what the operator does."""

    name: Name
    public_key: PublicKey


class Roster2(Roster, frozen=True, kw_only=True):
    """A roster of version 2: it can name public sizes and the operator's approvers."""

    members: tuple[Member2, ...]
    approvers: tuple[Approver, ...] = ()
    approvals: Annotated[int, msgspec.Meta(ge=0, le=10)] = 0
    """Number of different approvers who must sign before the operator starts a job."""
    version: Annotated[int, msgspec.Meta(ge=2, le=2)] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [approver.name for approver in self.approvers]
        parties = [self.operator, *(member.public_key for member in self.members)]
        keys = [*parties, *(approver.public_key for approver in self.approvers)]
        if names != sorted(set(names)):
            raise ValueError("approvers must be unique and sorted by name")
        if len(set(keys)) != len(keys):
            raise ValueError("an approver may not share a key with another party")
        if self.approvals > len(self.approvers):
            raise ValueError("a roster asks for more approvals than it has approvers")
