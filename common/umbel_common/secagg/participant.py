"""A site's side of one attempt: Bonawitz et al. 2017, figure 4, with the consistency round.

::

    advertise -> Advertised -> Shared -> Masked -> Confirmed -> Revealed
    prepare -> Prepared ---------------^

The second way is that of an attempt that was prepared (`preparation`): its shares are out before it
begins, and rounds 1 and 2 of the paper are one request.

The law of this module:

- No state keeps a secret that no later step needs, and none gets a field for one. From `Confirmed`
  on, no state holds both shares of a peer.
- A state never changes. It is journaled before the answer that came with it is sent, and the
  journal gives each stage one answer. So tags and fields of the states are on disks: none is ever
  renamed or removed.
- A refusal leaves the state as it was, and nothing is answered.
- No clock, no file, no network; randomness comes from `entropy` alone.

Steps, by stage, in this order; "round" is the paper's. A code in backquotes refuses the request,
and stands in the step that makes the check, before the steps that it guards. `entropy`, `secret`,
`threshold`, `points` are faults of our own code, in S1.2, S2.5 and S2.6.

1. `advertise` (round 0)

   - S1.1 Hold the cohort against the site's own rules: `not-in-cohort`, `cohort-too-small`,
     `threshold-too-high`, `threshold-too-low`. Guards S1.2: no secret is drawn for an
     attempt that this site does not join.
   - S1.2 Draw the secrets of the attempt: cipher key, mask key, self-mask seed.
   - S1.3 Sign the advert: both public keys, a commitment to the seed, the ledger's head.

2. `Advertised.receive` (round 1)

   - S2.1 Open each advert of U1 under the identity that the roster pins: `malformed-message`,
     `not-in-cohort`, `not-in-roster`, `pinned-signature`, `other-context`. Guards S2.5 and S2.6:
     shares and masks only for keys that a site of the cohort advertised for this attempt.
   - S2.2 Refuse what occurs twice: `duplicate-site`, `duplicate-key`. Guards S2.5, one share
     for a site, and S2.6, one mask for a pair.
   - S2.3 Find this site's own advert as it signed it: `own-advert`. Guards S2.6: peers that were
     shown another key derive other masks.
   - S2.4 Count U1: `too-few-adverts`. Guards S2.5: no share for an attempt that cannot end.
   - S2.5 Split the seed and the mask key into one share of each for each site of U1.
   - S2.6 Agree on keys with each peer, and seal its two shares for it: `weak-key`, with which
     everybody would know the agreed key. Guards S2.7.
   - S2.7 Keep the agreed keys; the key pairs and the seed are dropped.

   `Prepared.receive` (rounds 1 and 2 of an attempt that was prepared) takes S2.1 to S2.4, then

   - S2.8 See that each peer advertised the keys that it prepared: `other-keys`. Guards S2.9: the
     shares that this site will hold are of the secrets behind those keys.
   - S2.9 Agree on mask keys with each peer, as in S2.6; then all of step 3. Both kinds of mask are
     bound to the adverts of U1 too: the keys are older than the delta, and the head of the ledger
     in this site's own advert names the delta. So two deltas never have one mask.

   A `Prepared` site whose peers did not all prepare is asked for shares again, as in step 2, and
   answers from the same keys; masks are then bound as in S2.9, at all sites. It answers one of the
   two.

3. `Shared.receive` (round 2)

   - S3.1 See that the vector can be masked in place: `ring-vector`. Guards S3.5.
   - S3.2 See for whom the shares are and who sent them, U2: `wrong-recipient`, `duplicate-site`,
     `not-nested`. Guards S3.4: shares of U1 only, and one of each.
   - S3.3 Count U2: `too-few-shares`. Guards S3.5: a vector must not hide among too few.
   - S3.4 Decrypt every share: `share-decrypt`, `share-range`. Guards S3.5: a vector is masked
     only if its masks can be removed later.
   - S3.5 Add this site's own mask; add the masks with later peers of U2, subtract those with
     earlier ones.
   - S3.6 Keep the peers' shares; the mask keys are dropped.

4. `Masked.receive` (round 3, the consistency check)

   - S4.1 See that the names of U3 are sorted, each once: `duplicate-site`, `survivor-order`.
     Guards S4.5: a signed set has one encoding.
   - S4.2 See that U3 lies within U2 and has this site: `not-nested`, `own-site-missing`. Guards
     S4.4: this site holds shares of U2 alone, and helps no one to open its own vector as that of
     a site that dropped out.
   - S4.3 Count U3: `too-few-survivors`. Guards S4.5: no signature under a sum of too few.
   - S4.4 Keep one share of each peer: of its seed if it survived, of its mask key if it did not.
     The other is dropped.
   - S4.5 Sign (context, U3).

5. `Confirmed.receive` (round 4)

   - S5.1 Open each signature as one by a survivor, over the set that this site signed:
     `duplicate-site`, `not-a-survivor`, `pinned-signature`, `malformed-message`,
     `other-context`, `other-survivors`. Guards S5.2: only such signatures count.
   - S5.2 Count them: `too-few-signatures`. Guards S5.3.
   - S5.3 Reveal the shares kept in S4.4; no secret is left.
"""

from collections.abc import Iterable
from typing import Annotated, TypeAlias

import msgspec

from umbel_common.canonical import Digest, Entropy, Name, Value
from umbel_common.errors import require
from umbel_common.plans.statements import RoundHeader
from umbel_common.secagg.checks import check_confirmation, check_distinct_keys, open_advert
from umbel_common.secagg.encoding import RingVector
from umbel_common.secagg.masking import (
    add_masks,
    check_ring_vector,
    pairwise_key,
    prepared_mask_context,
    self_mask_key,
)
from umbel_common.secagg.messages import (
    EncryptedShare,
    KeyAdvert,
    RevealedShare,
    ShareBytes,
    Survivors,
    SurvivorSignature,
    X25519Key,
)
from umbel_common.secagg.primitives import KEY_BYTES, commit, load, public_key
from umbel_common.secagg.rules import Rules, check_distinct, check_nested
from umbel_common.secagg.sharing import Secrets, open_share, share_secrets
from umbel_common.trust.identity import Identity, Roster, Signed, sign

Key = Annotated[bytes, msgspec.Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]


class SiteState(Value, frozen=True, tag_field="state"):
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
    # S1.1
    rules.check_cohort(header.cohort, site)
    # S1.2
    secrets = Secrets.drawn(entropy)
    # S1.3
    return advertised(secrets, header, site, rules, identity, ledger_head)


def advertised(
    secrets: Secrets,
    header: RoundHeader,
    site: str,
    rules: Rules,
    identity: Identity,
    ledger_head: bytes,
) -> tuple["Advertised", Signed]:
    """Step S1.3: the signed advert of fresh or prepared secrets, over the attempt's context."""
    context = header.context()
    advert = sign(
        identity,
        KeyAdvert(
            context=context,
            site=site,
            cipher_key=public_key(secrets.cipher_secret),
            mask_key=public_key(secrets.mask_secret),
            seed_commitment=commit(secrets.seed, context, site),
            ledger_head=ledger_head,
        ),
    )
    state = Advertised(
        context=context,
        site=site,
        rules=rules,
        cohort=header.cohort,
        advert=advert,
        cipher_secret=secrets.cipher_secret,
        mask_secret=secrets.mask_secret,
        seed=secrets.seed,
    )
    return state, advert


class Advertised(SiteState, frozen=True, tag="advertised"):
    """Stage 1 is done: the keys are advertised."""

    cohort: tuple[Name, ...]
    advert: Signed
    cipher_secret: Key
    mask_secret: Key
    seed: Key

    def receive(
        self, adverts: tuple[Signed, ...], roster: Roster, entropy: Entropy, *, again: bool = False
    ) -> tuple["Shared", tuple[EncryptedShare, ...]]:
        """Stage 2: verifies the keys of U1, and shares both secrets with its sites.

        Args:
            again: a site of this attempt may have prepared it, so that its keys are older than its
                delta. Always so where this site has.

        Raises:
            RemoteProtocolError: `malformed-message`, `not-in-cohort`, `pinned-signature`,
                `other-context`, `not-in-roster`, `duplicate-site`, `duplicate-key`, `own-advert`,
                `too-few-adverts` or `weak-key`.
        """
        peers = self.verify(adverts, roster)
        # S2.5, S2.6
        shared = share_secrets(
            Secrets(self.cipher_secret, self.mask_secret, self.seed),
            self.site,
            [(peer.site, peer.cipher_key) for peer in peers],
            self.cohort,
            self.context,
            self.rules.threshold,
            entropy,
        )
        # S2.6
        masks = prepared_mask_context(self.context, adverts) if again else self.context
        mask_keys = self.mask_keys(peers, masks)
        keys = [
            PeerKeys(
                peer=peer.site,
                opening_key=shared.opening_keys[peer.site],
                mask_key=mask_keys[peer.site],
            )
            for peer in peers
        ]
        # S2.7
        after = Shared(
            context=self.context,
            site=self.site,
            rules=self.rules,
            peers=tuple(keys),
            self_mask_key=self_mask_key(self.seed, self.site, masks),
            own_share=shared.own_share,
        )
        return after, shared.messages

    def mask_keys(self, peers: Iterable[KeyAdvert], context: bytes) -> dict[str, bytes]:
        """Part of step S2.6: peer -> the key of the mask between it and this site.

        Args:
            context: of the masks, 32 bytes: the attempt's, or `prepared_mask_context`.

        Raises:
            RemoteProtocolError: `weak-key`.
        """
        ours = load(self.mask_secret)
        return {
            peer.site: pairwise_key(ours, self.site, peer.mask_key, peer.site, context)
            for peer in peers
        }

    def verify(self, adverts: tuple[Signed, ...], roster: Roster) -> list[KeyAdvert]:
        """Steps S2.1 to S2.4: the adverts of U1 without this site's own, sorted by site.

        Raises:
            RemoteProtocolError: as `receive`, but for `weak-key`.
        """
        # S2.1
        opened = [open_advert(advert, self.context, self.cohort, roster) for advert in adverts]
        sites = [advert.site for advert in opened]
        # S2.2
        check_distinct(sites)
        check_distinct_keys(opened)
        # S2.3
        require(
            self.advert in adverts,
            "own-advert",
            "the keys of this site are missing or altered",
            field=self.site,
        )
        # S2.4
        self.rules.check_enough("too-few-adverts", sites)
        return sorted(
            (advert for advert in opened if advert.site != self.site),
            key=lambda advert: advert.site,
        )


class Shared(SiteState, frozen=True, tag="shared"):
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
        return self.mask(shares, vector, self.context)

    def mask(
        self, shares: tuple[EncryptedShare, ...], vector: RingVector, bound_to: bytes
    ) -> tuple["Masked", RingVector]:
        """As `receive`, with shares that are bound to the context `bound_to`, 32 bytes."""
        # S3.1
        check_ring_vector(vector)
        # S3.2
        keys = {peer.peer: peer for peer in self.peers}
        require(
            all(share.recipient == self.site for share in shares),
            "wrong-recipient",
            "a share is for another site",
        )
        senders = [share.sender for share in shares]
        check_distinct(senders)
        check_nested(senders, keys.keys())
        # S3.3
        self.rules.check_enough("too-few-shares", [self.site, *senders])
        # S3.4
        held = []
        for share in shares:
            self_mask, mask_key = open_share(
                share, self.site, keys[share.sender].opening_key, bound_to
            )
            held.append(HeldShares(owner=share.sender, self_mask=self_mask, mask_key=mask_key))
        # S3.5
        add_masks(
            vector,
            added=[
                self.self_mask_key,
                *(keys[name].mask_key for name in senders if name > self.site),
            ],
            subtracted=[keys[name].mask_key for name in senders if name < self.site],
        )
        # S3.6
        after = Masked(
            context=self.context,
            site=self.site,
            rules=self.rules,
            held=tuple(held),
            own_share=self.own_share,
        )
        return after, vector


class PreparedPeer(Value, frozen=True):
    """A peer's prepared keys, and the key that decrypts the shares that it prepared."""

    peer: Name
    cipher_key: X25519Key
    mask_key: X25519Key
    opening_key: Key


class Prepared(SiteState, frozen=True, tag="prepared"):
    """Stage 1 of a prepared attempt is done: its shares are out, and its keys are advertised."""

    advertised: Advertised
    """From where this site continues if not all of its peers prepared."""
    preparation: Digest
    """`Preparation.context`, to which the peers' shares are bound."""
    peers: tuple[PreparedPeer, ...]
    own_share: ShareBytes

    def receive(
        self,
        adverts: tuple[Signed, ...],
        shares: tuple[EncryptedShare, ...],
        roster: Roster,
        vector: RingVector,
    ) -> tuple["Masked", RingVector]:
        """Stages 2 and 3: verifies the keys of U1, opens the shares, masks `vector` in place.

        Args:
            adverts, shares: as those of `Advertised.receive` and `Shared.receive`.
            vector: uint32[n] or uint16[n], little-endian; handed over: it is returned, masked.

        Raises:
            RemoteProtocolError: `other-keys`, or as `Advertised.receive` and `Shared.receive`;
                `vector` is then unmasked.
            LocalProtocolError: `ring-vector`.
        """
        # S2.1 to S2.4
        advertised = self.advertised.verify(adverts, roster)
        # S2.8
        known = {peer.peer: peer for peer in self.peers}
        for advert in advertised:
            peer = known.get(advert.site)
            require(
                peer is not None
                and (peer.cipher_key, peer.mask_key) == (advert.cipher_key, advert.mask_key),
                "other-keys",
                "a site advertised other keys than it prepared",
                field=advert.site,
            )
        # S2.9
        masks = prepared_mask_context(self.context, adverts)
        mask_keys = self.advertised.mask_keys(advertised, masks)
        shared = Shared(
            context=self.context,
            site=self.site,
            rules=self.rules,
            peers=tuple(
                PeerKeys(peer=name, opening_key=known[name].opening_key, mask_key=mask_key)
                for name, mask_key in mask_keys.items()
            ),
            self_mask_key=self_mask_key(self.advertised.seed, self.site, masks),
            own_share=self.own_share,
        )
        return shared.mask(shares, vector, self.preparation)


class Masked(SiteState, frozen=True, tag="masked"):
    """Stage 3 is done: the masked vector is out."""

    held: tuple[HeldShares, ...]
    """Shares that the other sites of U2 made for this one."""
    own_share: ShareBytes

    def receive(
        self, survivors: tuple[str, ...], identity: Identity
    ) -> tuple["Confirmed", SurvivorSignature]:
        """Stage 4: signs the survivor set U3, and drops every share that the set rules out.

        Raises:
            RemoteProtocolError: `duplicate-site`, `survivor-order`, `not-nested`,
                `own-site-missing` or `too-few-survivors`.
        """
        # S4.1
        check_distinct(survivors)
        require(
            list(survivors) == sorted(survivors),
            "survivor-order",
            "survivors are not sorted by name",
        )
        # S4.2
        members = {self.site, *(share.owner for share in self.held)}
        check_nested(survivors, members)
        require(
            self.site in survivors,
            "own-site-missing",
            "this site sent its vector but is not among the survivors",
            field=self.site,
        )
        # S4.3
        self.rules.check_enough("too-few-survivors", survivors)
        # S4.4
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
        # S4.5
        statement = Survivors(context=self.context, sites=survivors)
        return after, SurvivorSignature(site=self.site, signed=sign(identity, statement))


class Confirmed(SiteState, frozen=True, tag="confirmed"):
    """Stage 4 is done: this site signed a survivor set, and will help to unmask no other."""

    survivors: tuple[Name, ...]
    shares: tuple[RevealedShare, ...]
    """One for each site of U2."""

    def receive(
        self, signatures: tuple[SurvivorSignature, ...], roster: Roster
    ) -> tuple["Revealed", tuple[RevealedShare, ...]]:
        """Stage 5: reveals its shares once enough survivors signed the set that it signed.

        Raises:
            RemoteProtocolError: `duplicate-site`, `not-a-survivor`, `pinned-signature`,
                `malformed-message`, `other-context`, `other-survivors` or `too-few-signatures`.
        """
        # S5.1
        check_distinct([signature.site for signature in signatures])
        for signature in signatures:
            check_confirmation(signature, self.context, self.survivors, roster)
        # S5.2
        require(
            len(signatures) >= self.rules.threshold,
            "too-few-signatures",
            "too few survivors signed the survivor set",
            found=len(signatures),
            accepted=f"at least {self.rules.threshold}",
        )
        # S5.3
        after = Revealed(context=self.context, site=self.site, rules=self.rules)
        return after, self.shares


class Revealed(SiteState, frozen=True, tag="revealed"):
    """The attempt is over for this site; nothing secret is left."""


AttemptState: TypeAlias = Advertised | Prepared | Shared | Masked | Confirmed | Revealed
