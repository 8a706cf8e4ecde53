"""What a site draws for one attempt, shared with its peers and opened by them.

The law: a site's secrets are drawn together and used for one attempt. Shares are bound to a
context, of the attempt or of its preparation, and to sender and recipient; both of a site's shares
travel in one ciphertext. Steps of `participant` (S) and `preparation` (P) that these are:

- `Secrets.drawn`: S1.2 and P1.2
- `share_secrets`: S2.5 and S2.6 but for the mask keys; P2.5 and P2.6
- `open_share`: S3.4
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from umbel_common.canonical import Entropy
from umbel_common.errors import require
from umbel_common.secagg.messages import EncryptedShare
from umbel_common.secagg.primitives import (
    KEY_BYTES,
    agree,
    derive,
    draw,
    load,
    seal,
    share_binding,
    unseal,
)
from umbel_common.secagg.shamir import SHARE_BYTES, draw_element, is_element, split


class Secrets:
    """Two X25519 keys and the seed of a self-mask, 32 bytes each.

    No dataclass: msgspec cannot encode it, and nothing that holds it.
    """

    def __init__(self, cipher_secret: bytes, mask_secret: bytes, seed: bytes) -> None:
        self.cipher_secret = cipher_secret
        self.mask_secret = mask_secret
        self.seed = seed

    @classmethod
    def drawn(cls, entropy: Entropy) -> "Secrets":
        """Fresh secrets; the bytes of `entropy` are the secrets."""
        cipher_secret = draw(entropy, KEY_BYTES)
        # These two are shared, so they must be field elements.
        return cls(cipher_secret, draw_element(entropy), draw_element(entropy))


# No generated repr: it would write secrets into whatever log they are printed to.
@dataclass(frozen=True, repr=False, eq=False)
class SharedSecrets:
    """What sharing a site's secrets gives."""

    messages: tuple[EncryptedShare, ...]
    """One for each peer."""
    opening_keys: Mapping[str, bytes]
    """Peer -> the key that decrypts its shares, 32 bytes."""
    own_share: bytes
    """This site's own share of its seed, 32 bytes."""


def share_secrets(
    secrets: Secrets,
    site: str,
    peers: Sequence[tuple[str, bytes]],
    cohort: tuple[str, ...],
    context: bytes,
    threshold: int,
    entropy: Entropy,
) -> SharedSecrets:
    """One sealed pair of shares, of seed and mask key, for each peer.

    Args:
        peers: each with its public cipher key, in the order of the messages.
        cohort: a site's share is at its place in the cohort, from 1.
        context: of the attempt or of its preparation, 32 bytes.

    Raises:
        RemoteProtocolError: `weak-key`.
        LocalProtocolError: `points` where a peer is there twice.
    """
    points = [cohort.index(name) + 1 for name in (site, *(peer for peer, _ in peers))]
    seed_shares = split(secrets.seed, points, threshold, entropy)
    key_shares = split(secrets.mask_secret, points, threshold, entropy)
    ours = load(secrets.cipher_secret)
    messages, opening_keys = [], {}
    for (peer, theirs), *shares in zip(peers, seed_shares[1:], key_shares[1:], strict=True):
        agreed = agree(ours, theirs, peer)
        sealing_key = derive(agreed, "share", context, (site, peer))
        bound = share_binding(context, site, peer)
        ciphertext = seal(sealing_key, b"".join(shares), bound, entropy)
        messages.append(EncryptedShare(sender=site, recipient=peer, ciphertext=ciphertext))
        opening_keys[peer] = derive(agreed, "share", context, (peer, site))
    return SharedSecrets(tuple(messages), opening_keys, seed_shares[0])


def open_share(share: EncryptedShare, site: str, key: bytes, context: bytes) -> tuple[bytes, bytes]:
    """The shares in a message to a site: of its sender's seed and of its mask key.

    Args:
        site: this site, whatever recipient the message names.
        key: this site's opening key for the sender.
        context: as the sender's in `share_secrets`.

    Raises:
        RemoteProtocolError: `share-decrypt` or `share-range`.
    """
    data = unseal(key, share.ciphertext, share_binding(context, share.sender, site))
    require(
        data is not None,
        "share-decrypt",
        "a share does not decrypt in the context of this attempt",
        field=share.sender,
    )
    assert data is not None  # required above
    self_mask, mask_key = data[:SHARE_BYTES], data[SHARE_BYTES:]
    require(
        is_element(self_mask) and is_element(mask_key),
        "share-range",
        "a share is not below the prime",
        field=share.sender,
    )
    return self_mask, mask_key
