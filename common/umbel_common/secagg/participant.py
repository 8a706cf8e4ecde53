"""A site's side of one attempt (Bonawitz et al. 2017, figure 4, with the consistency round).

::

    advertise -> Advertised -> Shared -> Masked -> Confirmed -> Revealed

Each state is a frozen value that the site journals before it sends what came with it. A state holds
the secrets that later stages need and no others: key pairs are gone once the pairwise keys are
derived, masks once they are added, and of each pair of shares one is dropped as the survivor set is
signed. A refused message leaves the state as it was.
"""

from typing import Annotated, TypeAlias

import msgspec

from umbel_common.canonical import Digest, Entropy, Name, Value
from umbel_common.errors import require
from umbel_common.plans.statements import RoundHeader
from umbel_common.secagg.checks import check_distinct_keys, open_advert, open_survivors
from umbel_common.secagg.encoding import RingVector
from umbel_common.secagg.masking import (
    add_masks,
    check_ring_vector,
    pairwise_key,
    self_mask_key,
)
from umbel_common.secagg.messages import (
    EncryptedShare,
    KeyAdvert,
    RevealedShare,
    ShareBytes,
    Survivors,
    SurvivorSignature,
)
from umbel_common.secagg.primitives import (
    KEY_BYTES,
    agree,
    commit,
    derive,
    draw,
    load,
    public_key,
    seal,
    share_binding,
    unseal,
)
from umbel_common.secagg.rules import Rules, check_distinct, check_nested
from umbel_common.secagg.shamir import SHARE_BYTES, draw_element, is_element, split
from umbel_common.trust.identity import Identity, Roster, Signed, sign

__all__ = [
    "Advertised",
    "AttemptState",
    "Confirmed",
    "Masked",
    "Revealed",
    "Rules",
    "Shared",
    "advertise",
]

Key = Annotated[bytes, msgspec.Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]


class Stage(Value, frozen=True, tag_field="state"):
    """What every state knows of its attempt."""

    context: Digest
    site: Name
    rules: Rules


class PeerKeys(Value, frozen=True):
    """The keys that two sites share in one attempt."""

    peer: Name
    opening_key: Key
    """Decrypts the peer's shares."""
    mask_key: Key
    """Expands to the pairwise mask."""


class HeldShares(Value, frozen=True):
    """Both shares of one peer, of which one at most will be revealed."""

    owner: Name
    self_mask: ShareBytes
    mask_key: ShareBytes


def advertise(
    header: RoundHeader,
    site: str,
    rules: Rules,
    identity: Identity,
    ledger_head: bytes,
    entropy: Entropy,
) -> tuple["Advertised", Signed]:
    """Stage 1: fresh keys for one attempt, and the signed advert of their public halves.

    Args:
        ledger_head: 32 bytes, the head of the site's ledger after the round was reserved.
        entropy: its bytes are the secrets of the attempt.

    Raises:
        RemoteProtocolError: `not-in-cohort`, `cohort-too-small`, `threshold-too-high` or
            `threshold-too-low`.
    """
    rules.check_cohort(header.cohort, site)
    context = header.context()
    cipher_secret = draw(entropy, KEY_BYTES)
    # These two are shared, so they must be field elements.
    mask_secret, seed = draw_element(entropy), draw_element(entropy)
    advert = sign(
        identity,
        KeyAdvert(
            context=context,
            site=site,
            cipher_key=public_key(cipher_secret),
            mask_key=public_key(mask_secret),
            seed_commitment=commit(seed, context, site),
            ledger_head=ledger_head,
        ),
    )
    state = Advertised(
        context=context,
        site=site,
        rules=rules,
        cohort=header.cohort,
        advert=advert,
        cipher_secret=cipher_secret,
        mask_secret=mask_secret,
        seed=seed,
    )
    return state, advert


class Advertised(Stage, frozen=True, tag="advertised"):
    """Stage 1 is done: keys are advertised."""

    cohort: tuple[Name, ...]
    advert: Signed
    cipher_secret: Key
    mask_secret: Key
    seed: Key

    def receive(
        self, adverts: tuple[Signed, ...], roster: Roster, entropy: Entropy
    ) -> tuple["Shared", tuple[EncryptedShare, ...]]:
        """Stage 2: verifies the keys of U1, and shares both secrets with its sites.

        Raises:
            RemoteProtocolError: `malformed-message`, `not-in-cohort`, `pinned-signature`,
                `other-context`, `duplicate-site`, `duplicate-key`, `own-advert`,
                `too-few-adverts` or `weak-key`.
        """
        peers = self._verify(adverts, roster)
        sites = (self.site, *(peer.site for peer in peers))
        points = [self.cohort.index(site) + 1 for site in sites]
        threshold = self.rules.threshold
        seed_shares = split(self.seed, points, threshold, entropy)
        key_shares = split(self.mask_secret, points, threshold, entropy)
        cipher_key, mask_key = load(self.cipher_secret), load(self.mask_secret)
        keys, messages = [], []
        for peer, *shares in zip(peers, seed_shares[1:], key_shares[1:], strict=True):
            secret = agree(cipher_key, peer.cipher_key, peer.site)
            sealing_key = derive(secret, "share", self.context, (self.site, peer.site))
            bound = share_binding(self.context, self.site, peer.site)
            ciphertext = seal(sealing_key, b"".join(shares), bound, entropy)
            messages.append(
                EncryptedShare(sender=self.site, recipient=peer.site, ciphertext=ciphertext)
            )
            keys.append(
                PeerKeys(
                    peer=peer.site,
                    opening_key=derive(secret, "share", self.context, (peer.site, self.site)),
                    mask_key=pairwise_key(
                        mask_key, self.site, peer.mask_key, peer.site, self.context
                    ),
                )
            )
        after = Shared(
            context=self.context,
            site=self.site,
            rules=self.rules,
            peers=tuple(keys),
            self_mask_key=self_mask_key(self.seed, self.site, self.context),
            own_share=seed_shares[0],
        )
        return after, tuple(messages)

    def _verify(self, adverts: tuple[Signed, ...], roster: Roster) -> list[KeyAdvert]:
        """The adverts of U1 without this site's own, sorted by site."""
        opened = [open_advert(advert, self.context, self.cohort, roster) for advert in adverts]
        sites = [advert.site for advert in opened]
        check_distinct(sites)
        check_distinct_keys(opened)
        require(
            self.advert in adverts,
            "own-advert",
            "the keys of this site are missing or altered",
            field=self.site,
        )
        self.rules.check_enough("too-few-adverts", sites)
        return sorted(
            (advert for advert in opened if advert.site != self.site),
            key=lambda advert: advert.site,
        )


class Shared(Stage, frozen=True, tag="shared"):
    """Stage 2 is done: peers hold shares of this site's secrets."""

    peers: tuple[PeerKeys, ...]
    """U1 without this site."""
    self_mask_key: Key
    own_share: ShareBytes
    """This site's own share of its self-mask seed."""

    def receive(
        self, shares: tuple[EncryptedShare, ...], vector: RingVector
    ) -> tuple["Masked", RingVector]:
        """Stage 3: opens the shares of U2, then masks `vector` in place.

        Args:
            shares: one from each other site of U2, addressed to this one.
            vector: uint32[n] or uint16[n], little-endian; handed over: it is returned, masked.

        Raises:
            RemoteProtocolError: `wrong-recipient`, `duplicate-site`, `not-nested`,
                `too-few-shares`, `share-decrypt` or `share-range`; `vector` is then unmasked.
            LocalProtocolError: `ring-vector`.
        """
        check_ring_vector(vector)
        keys = {peer.peer: peer for peer in self.peers}
        require(
            all(share.recipient == self.site for share in shares),
            "wrong-recipient",
            "a share is for another site",
        )
        senders = [share.sender for share in shares]
        check_distinct(senders)
        check_nested(senders, keys.keys())
        self.rules.check_enough("too-few-shares", [self.site, *senders])
        held = [self._open(share, keys[share.sender].opening_key) for share in shares]
        add_masks(
            vector,
            added=[
                self.self_mask_key,
                *(keys[name].mask_key for name in senders if name > self.site),
            ],
            subtracted=[keys[name].mask_key for name in senders if name < self.site],
        )
        after = Masked(
            context=self.context,
            site=self.site,
            rules=self.rules,
            held=tuple(held),
            own_share=self.own_share,
        )
        return after, vector

    def _open(self, share: EncryptedShare, key: bytes) -> HeldShares:
        bound = share_binding(self.context, share.sender, self.site)
        data = unseal(key, share.ciphertext, bound)
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
        return HeldShares(owner=share.sender, self_mask=self_mask, mask_key=mask_key)


class Masked(Stage, frozen=True, tag="masked"):
    """Stage 3 is done: the masked vector is out."""

    held: tuple[HeldShares, ...]
    """From U2 without this site."""
    own_share: ShareBytes

    def receive(
        self, survivors: tuple[str, ...], identity: Identity
    ) -> tuple["Confirmed", SurvivorSignature]:
        """Stage 4: signs the survivor set U3, and drops every share that it rules out.

        Raises:
            RemoteProtocolError: `duplicate-site`, `survivor-order`, `not-nested`,
                `own-site-missing` or `too-few-survivors`.
        """
        check_distinct(survivors)
        require(
            list(survivors) == sorted(survivors),
            "survivor-order",
            "survivors are not sorted by name",
        )
        members = {self.site, *(share.owner for share in self.held)}
        check_nested(survivors, members)
        require(
            self.site in survivors,
            "own-site-missing",
            "this site sent its vector and is no survivor",
            field=self.site,
        )
        self.rules.check_enough("too-few-survivors", survivors)
        own = RevealedShare(owner=self.site, kind="self-mask", share=self.own_share)
        revealed = [
            RevealedShare(owner=share.owner, kind="self-mask", share=share.self_mask)
            if share.owner in survivors
            else RevealedShare(owner=share.owner, kind="mask-key", share=share.mask_key)
            for share in self.held
        ]
        after = Confirmed(
            context=self.context,
            site=self.site,
            rules=self.rules,
            survivors=survivors,
            shares=tuple(sorted([own, *revealed], key=lambda share: share.owner)),
        )
        statement = Survivors(context=self.context, sites=survivors)
        return after, SurvivorSignature(site=self.site, signed=sign(identity, statement))


class Confirmed(Stage, frozen=True, tag="confirmed"):
    """Stage 4 is done: this site signed a survivor set and will help unmask no other."""

    survivors: tuple[Name, ...]
    shares: tuple[RevealedShare, ...]
    """One for each site of U2: no state holds both shares of a peer from here on."""

    def receive(
        self, signatures: tuple[SurvivorSignature, ...], roster: Roster
    ) -> tuple["Revealed", tuple[RevealedShare, ...]]:
        """Stage 5: reveals its shares once enough survivors signed the set that it signed.

        Raises:
            RemoteProtocolError: `duplicate-site`, `not-a-survivor`, `pinned-signature`,
                `malformed-message`, `other-context`, `other-survivors` or `too-few-signatures`.
        """
        check_distinct([signature.site for signature in signatures])
        for signature in signatures:
            open_survivors(signature, self.context, self.survivors, roster)
        require(
            len(signatures) >= self.rules.threshold,
            "too-few-signatures",
            "too few survivors signed the survivor set",
            found=len(signatures),
            accepted=f"at least {self.rules.threshold}",
        )
        after = Revealed(context=self.context, site=self.site, rules=self.rules)
        return after, self.shares


class Revealed(Stage, frozen=True, tag="revealed"):
    """The attempt is over for this site; nothing secret is left."""


AttemptState: TypeAlias = Advertised | Shared | Masked | Confirmed | Revealed
