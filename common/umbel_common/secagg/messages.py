"""The messages of one attempt, between sites and coordinator. `ctx` is `RoundHeader.context()`."""

from typing import Annotated

import msgspec

from umbel_common.canonical import Digest, Name, Value
from umbel_common.plans.statements import Cohort, check_sorted
from umbel_common.trust.identity import Signed

X25519Key = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
ShareBytes = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
"""One Shamir share: an integer below 2^256 - 189, big-endian."""


class KeyAdvert(Value, frozen=True):
    """Stage 1, signed by the site: fresh public keys for one attempt."""

    context: Digest
    site: Name
    cipher_key: X25519Key
    """Encrypts shares between two sites."""
    mask_key: X25519Key
    """Agrees the pairwise mask; its secret half is what peers hold shares of."""
    seed_commitment: Digest
    """Of the self-mask seed: Shamir shares are not authenticated, so what the coordinator recovers
    from them is checked against this."""
    ledger_head: Digest
    """Head of the site's ledger chain after the round was reserved: in the signed transcript, a
    ledger that was rolled back later contradicts it."""


class EncryptedShare(Value, frozen=True):
    """Stage 2: one sender's shares for one recipient, under a key that only these two derive."""

    sender: Name
    recipient: Name
    ciphertext: Annotated[bytes, msgspec.Meta(min_length=92, max_length=92)]
    """12-byte nonce, then ChaCha20-Poly1305 of two 32-byte shares (self-mask seed, mask key)."""


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
    """The peer whose secret this is a share of."""
    kind: Annotated[str, msgspec.Meta(pattern=r"^(self-mask|mask-key)\Z")]
    """`self-mask` if the owner survived, `mask-key` if it dropped out."""
    share: ShareBytes
