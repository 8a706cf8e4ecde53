"""The messages of one attempt, between sites and coordinator. `ctx` is `RoundHeader.context()`.

The law: `KeyAdvert`, `PreparedKeys` and `Survivors` are signed, `Preparation` is hashed, and all of
these types travel. None ever gets, loses or renames a field, and none is renamed, without another
`protocol.wire.WIRE_VERSION`. A message has no vector, no seed and no secret key, and no share in
clear but the one for each site that stage 5 reveals.
"""

from typing import Annotated

import msgspec

from umbel_common.canonical import Digest, Name, Value, digest, encode
from umbel_common.plans.statements import (
    AttemptNumber,
    Cohort,
    RoundHeader,
    RoundNumber,
    check_sorted,
)
from umbel_common.trust.identity import Signed, label_of

X25519Key = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
ShareBytes = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
"""A Shamir share: an integer below 2^256 - 189, big-endian."""


class Preparation(Value, frozen=True):
    """The attempt for which keys and shares are prepared: its header but for what is known last,
    the adapter and the transcript before it."""

    federation: Name
    job: Name
    round: RoundNumber
    attempt: AttemptNumber
    plan: Digest
    roster: Digest
    cohort: Cohort

    def __post_init__(self) -> None:
        check_sorted(self.cohort)

    def context(self) -> bytes:
        """The 32 bytes to which prepared keys and shares are bound; no attempt's `ctx`."""
        return digest(label_of(type(self)), encode(self))


def preparation_of(header: RoundHeader) -> Preparation:
    """What the sites of an attempt may have prepared for it."""
    return Preparation(
        federation=header.federation,
        job=header.job,
        round=header.round,
        attempt=header.attempt,
        plan=header.plan,
        roster=header.roster,
        cohort=header.cohort,
    )


class PreparedKeys(Value, frozen=True):
    """Signed by the site: the public keys that it will advertise for a prepared attempt."""

    context: Digest
    """`Preparation.context`."""
    site: Name
    cipher_key: X25519Key
    mask_key: X25519Key


class KeyAdvert(Value, frozen=True):
    """Stage 1, signed by the site: fresh public keys for one attempt."""

    context: Digest
    site: Name
    cipher_key: X25519Key
    """Public key for the encryption of shares between two sites."""
    mask_key: X25519Key
    """Public key for the agreement on pairwise masks; peers hold shares of its secret half."""
    seed_commitment: Digest
    """Commitment to the self-mask seed. Shamir shares are not authenticated, so the coordinator
    checks what it recovers from them against this."""
    ledger_head: Digest
    """Head of the site's ledger chain after the round was reserved. The signed transcript has it,
    so a ledger that is rolled back later contradicts the transcript."""


class EncryptedShare(Value, frozen=True):
    """Stage 2: one sender's shares for one recipient, under a key that only these two derive."""

    sender: Name
    recipient: Name
    ciphertext: Annotated[bytes, msgspec.Meta(min_length=92, max_length=92)]
    """A 12-byte nonce, then ChaCha20-Poly1305 of two 32-byte shares (self-mask seed, mask key)."""


class Survivors(Value, frozen=True):
    """Stage 4, signed by each site: the set U3 whose masked vectors are in the sum."""

    context: Digest
    sites: Cohort

    def __post_init__(self) -> None:
        check_sorted(self.sites)


class SurvivorSignature(Value, frozen=True):
    """Stage 4: one site's signature over `Survivors`."""

    site: Name
    signed: Signed


class RevealedShare(Value, frozen=True):
    """Stage 5: exactly one share for one peer."""

    owner: Name
    """The peer to whose secret the share belongs."""
    kind: Annotated[str, msgspec.Meta(pattern=r"^(self-mask|mask-key)\Z")]
    """Kind of secret: `self-mask` if the owner survived, `mask-key` if it dropped out."""
    share: ShareBytes
