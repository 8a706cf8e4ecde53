"""What the holders of keys say about keys: a rotation to a new key, a revocation of a lost one.

The law: these types are signed. So none is renamed, and no field of one is ever added, renamed,
reordered or removed.

Both are judged only against a roster that a site pinned (`pinning`). A signature says who speaks,
not whether the speaker counts.
"""

from typing import Annotated, Literal

import msgspec

from umbel_common.canonical import Name, Value, encode
from umbel_common.trust.identity import (
    SIGNATURE_BYTES,
    Identity,
    PublicKey,
    label_of,
    sign,
    verifies,
)

Signature = Annotated[bytes, msgspec.Meta(min_length=SIGNATURE_BYTES, max_length=SIGNATURE_BYTES)]
"""An Ed25519 signature."""

OPERATOR = "operator"
"""Name of the operator where parties are named; no site may have it."""


class KeyRotation(Value, frozen=True):
    """One party's identity passes from one key to another."""

    federation: Name
    party: Name
    """Name of a site, or `OPERATOR`."""
    old_key: PublicKey
    new_key: PublicKey
    version: Literal[1] = 1

    def __post_init__(self) -> None:
        if self.old_key == self.new_key:
            raise ValueError("a rotation needs two different keys")


class SignedRotation(Value, frozen=True):
    """A rotation with both signatures over its canonical encoding.

    The old key's signature is the authority. The new key's proves that the party has the new key;
    without it, a party could claim a key that belongs to another.
    """

    rotation: KeyRotation
    by_old: Signature
    by_new: Signature

    def verifies(self) -> bool:
        """Whether both keys signed this rotation."""
        label, data = label_of(KeyRotation), encode(self.rotation)
        return verifies(self.rotation.old_key, label, data, self.by_old) and verifies(
            self.rotation.new_key, label, data, self.by_new
        )


class Revocation(Value, frozen=True):
    """The end of a key, which never again speaks for anybody."""

    federation: Name
    key: PublicKey
    version: Literal[1] = 1


class SignedRevocation(Value, frozen=True):
    """A revocation, with a signature over its canonical encoding."""

    revocation: Revocation
    signer: PublicKey
    """The key that signed: the revoked key itself, or the operator's."""
    signature: Signature

    def verifies(self) -> bool:
        """Whether `signer` signed this revocation; `pinning` says whether that counts."""
        return verifies(self.signer, label_of(Revocation), encode(self.revocation), self.signature)


def rotate(federation: str, party: str, old: Identity, new: Identity) -> SignedRotation:
    """The rotation of `party` from one identity to another, signed by both."""
    rotation = KeyRotation(
        federation=federation, party=party, old_key=old.public_key, new_key=new.public_key
    )
    return SignedRotation(
        rotation=rotation,
        by_old=sign(old, rotation).signature,
        by_new=sign(new, rotation).signature,
    )


def revoke(federation: str, key: bytes, signer: Identity) -> SignedRevocation:
    """The revocation of `key`, signed by its own identity or by the operator's."""
    revocation = Revocation(federation=federation, key=key)
    return SignedRevocation(
        revocation=revocation,
        signer=signer.public_key,
        signature=sign(signer, revocation).signature,
    )
